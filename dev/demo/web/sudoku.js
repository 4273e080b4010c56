// The second view: a Sudoku, by denoising steps and by loops.

import {$, Run, act, ask, make, number, play, refill, rove, sayStep, status} from './parts.js';

const SIDE = 9;
const BOX = 3;
const CELLS = Array.from({length: SIDE * SIDE}, (_, i) => i);
const PUZZLES = { // by build/sudoku
    '26 givens':
        '....8..6...367.4.86..1.3.57..8.5..311........5....29..3.4..7..................142',
    '30 givens':
        '14..3..5..53..9...9.8.....3.3......5.6..5.241...7.1.9..8.1..5..69...7...4.7...8.9',
    '36 givens':
        '6.4.1852......746..28.5..71..984.....8...39567.2.........581..4.4.73.1..5.3..4..2',
    '46 givens':
        '98.7.13.2...295.74742.86......85.61.1..469..8.67.3.5.95.492..8.6985...3.23..78.95',
};

// ---- rules ----

const row = i => Math.floor(i / SIDE);
const column = i => i % SIDE;
const box = i => BOX * Math.floor(row(i) / BOX) + Math.floor(column(i) / BOX);
const PEERS = CELLS.map(i => CELLS.filter(j => i !== j
    && (row(i) === row(j) || column(i) === column(j) || box(i) === box(j))));
const clashes = (board, i) => PEERS[i].some(j => board[j] === board[i]);

// The first two solutions of a board (digits, 0 for a blank), or null if that takes too long.
function solutions(board, mostSteps = 20000) {
    const found = [];
    let steps = 0;
    const search = b => {
        let best = -1;
        let choices = null;
        for (const i of CELLS) {
            if (b[i]) continue;
            const taken = new Set(PEERS[i].map(j => b[j]));
            const free = [1, 2, 3, 4, 5, 6, 7, 8, 9].filter(digit => !taken.has(digit));
            if (!choices || free.length < choices.length) [best, choices] = [i, free];
        }
        if (best < 0) found.push(b);
        for (const digit of choices || []) {
            if (found.length > 1 || ++steps > mostSteps) return;
            search(b.map((old, i) => i === best ? digit : old));
        }
    };
    if (!CELLS.some(i => board[i] && clashes(board, i))) search(board);
    return steps > mostSteps ? null : found;
}

// Draws rows of cells; cell(i) returns the properties of button i, and what it is called.
export function drawBoard(container, cell) {
    const cells = CELLS.map(i => {
        const {className, name, isChosen, ...rest} = cell(i);
        const lines = ([2, 5].includes(column(i)) ? ' box-right' : '')
            + ([2, 5].includes(row(i)) ? ' box-below' : '');
        return make('button', {type: 'button', className: `cell${lines} ${className}`,
            attributes: {role: 'gridcell', 'aria-selected': isChosen,
                'aria-label': `row ${row(i) + 1}, column ${column(i) + 1}: ${name}`},
            data: {position: i}, ...rest});
    });
    refill(container, Array.from({length: SIDE}, (_, r) =>
        make('div', {attributes: {role: 'row'}}, ...cells.slice(SIDE * r, SIDE * (r + 1)))));
}

// ---- the view ----

export const sudoku = {
    model: {name: 'sudoku'},
    chosen: 0, // cell

    async open() {
        if (this.model.about.T !== CELLS.length) throw new Error('The board is not 9x9.');
        this.run = new Run(this.model);
        for (const [name, digits] of Object.entries(PUZZLES))
            $('sudoku-puzzle').append(make('option', {value: digits, textContent: name}));
        for (let digit = 0; digit <= SIDE; digit++)
            $('sudoku-pad').append(make('button', {type: 'button', textContent: digit || 'blank',
                onclick: () => this.type(digit)}));
        rove($('sudoku-board'), SIDE);
        $('sudoku-form').addEventListener('submit', event => {
            event.preventDefault();
            act(() => this.solve());
        });
        $('sudoku-puzzle').addEventListener('change', () => this.load($('sudoku-puzzle').value));
        $('sudoku-clear').addEventListener('click', () => this.change(() => 0));
        for (const id of ['sudoku-step', 'sudoku-loop', 'sudoku-loops'])
            $(id).addEventListener('input', () => act(() => this.look()));
        play($('sudoku-play'), isFirst => this.play(isFirst));
        $('sudoku-board').addEventListener('click', ({target}) => target.focus());
        $('sudoku-board').addEventListener('focusin', ({target}) => this.choose(target));
        $('sudoku-board').addEventListener('keydown', event => {
            if (event.ctrlKey || event.metaKey || event.altKey) return;
            if (/^[0-9]$/.test(event.key)) this.type(Number(event.key));
            else if (['Backspace', 'Delete'].includes(event.key)) this.type(0);
            else if (/^[^ ]$/u.test(event.key)) status('Type 1 to 9, or 0 for a blank.');
        });
        await this.load($('sudoku-puzzle').value);
        await this.solve();
    },

    token(digit) {
        const {bytes, mask} = this.model.about;
        return digit ? bytes.findIndex(([byte]) => byte === 48 + digit) : mask; // 48: '0'
    },
    digits(tokens) {
        return tokens.map((token, t) =>
            this.run.isBlank(tokens, t) ? 0 : Number(this.model.text([token])));
    },
    shown() { return this.run.history[number('sudoku-step')]; },

    // Puts a puzzle on the board.
    load(digits) {
        return act(() => {
            this.run.begin(Array.from(digits, digit => this.token(Number(digit) || 0)));
            this.solutions = solutions(this.digits(this.run.start));
            Object.assign($('sudoku-step'), {max: 0, value: 0});
            $('sudoku-loop').value = 0;
            return this.look();
        });
    },

    // Puts another puzzle there: change(old digit, cell) returns its digits.
    change(change) {
        $('sudoku-puzzle').selectedIndex = -1;
        this.load(this.digits(this.run.start).map(change));
    },

    type(digit) { this.change((old, i) => i === this.chosen ? digit : old); },

    async solve() {
        if (this.solutions && !this.solutions.length)
            throw new Error('This puzzle has no solution.');
        const options = {loops: number('sudoku-loops'), steps: number('sudoku-steps'),
            order: 'confidence', temperature: 0, seed: 1};
        $('sudoku-loop').value = 0;
        await this.run.fill(this.run.start, options, () => {
            const last = this.run.history.length - 1;
            Object.assign($('sudoku-step'), {max: last, value: last});
            this.draw();
        });
        $('sudoku-board').dataset.tokens = this.run.final.join(' ');
    },

    choose({dataset}) {
        this.chosen = Number(dataset.position);
        for (const cell of $('sudoku-board').querySelectorAll('button'))
            cell.setAttribute('aria-selected', Number(cell.dataset.position) === this.chosen);
    },

    // Shows the next loop of this step, or else the next step.
    async play(isFirst) {
        const [step, loop] = [number('sudoku-step'), number('sudoku-loop')];
        const stepEnds = loop === number('sudoku-loops');
        $('sudoku-loop').value = isFirst || stepEnds ? 0 : loop + 1;
        if (isFirst || stepEnds) $('sudoku-step').value = isFirst ? 0 : step + 1;
        await act(() => this.look());
        return number('sudoku-step') < this.run.history.length - 1;
    },

    // The guesses after a loop do not depend on how many loops follow it.
    async look() {
        const loops = number('sudoku-loops');
        $('sudoku-loop').max = loops;
        const state = this.shown();
        if (number('sudoku-loop') > (state.seen || []).length) {
            const {tokens} = state;
            state.seen = (await ask('sudoku', 'look', {tokens, loops, query: -1})).loops;
        }
        this.draw();
    },

    draw() {
        const state = this.shown();
        const loop = Math.min(number('sudoku-loop'), (state.seen || []).length);
        const guess = loop ? this.digits(state.seen[loop - 1].guess) : state.tokens.map(() => 0);
        const board = this.digits(state.tokens).map((digit, i) => digit || guess[i]);
        const given = this.digits(this.run.start);
        const [solution, another] = this.solutions || [];
        const isOne = solution && !another;
        let wrong = 0;
        drawBoard($('sudoku-board'), i => {
            const digit = board[i];
            const isGuess = this.run.isBlank(state.tokens, i);
            const isWrong = digit && (given[i] ? clashes(given, i)
                : isOne ? digit !== solution[i] : clashes(board, i));
            wrong += isWrong ? 1 : 0;
            const kind = [given[i] && 'given', isWrong && 'wrong', !given[i] && !isWrong && 'right',
                isGuess && 'guess'].filter(Boolean).join(' ');
            return {className: digit ? kind : '', textContent: digit || '',
                name: digit ? `${digit}, ${kind}` : 'blank', isChosen: i === this.chosen};
        });
        sayStep('sudoku', state, this.run);
        $('sudoku-loops-at').textContent = number('sudoku-loops');
        $('sudoku-loop-at').textContent = loop || 'none';
        const count = `${wrong} wrong digit${wrong === 1 ? '' : 's'}`;
        $('sudoku-count').textContent = isOne ? count
            : !this.solutions ? `${count}; too many boards to look for solutions`
                : another ? `${count}; there is more than one solution`
                    : 'There is no solution. Digits that exclude each other are red.';
    },
};
