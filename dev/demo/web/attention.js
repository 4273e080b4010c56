// The third view: where a position looks, in each pass through a layer.

import {$, act, ask, make, number, percent, refill, rove} from './parts.js';
import {story} from './story.js';
import {drawBoard, sudoku} from './sudoku.js';

export const attention = {
    query: -1,
    turn: 0, // answers to earlier questions come too late

    async open() {
        rove($('attention-board'), 9);
        rove($('attention-text'));
        $('attention-of').addEventListener('change', () => act(() => this.look()));
        $('attention-loops').addEventListener('input', () => act(() => this.look()));
        $('attention-pass').addEventListener('input', () => this.draw());
        for (const id of ['attention-board', 'attention-text'])
            $(id).addEventListener('click', ({target}) => {
                if (target.dataset.position === undefined) return;
                target.focus();
                this.query = Number(target.dataset.position);
                act(() => this.look());
            });
    },

    // Of the step that the other view shows; if nothing is blank there, of its beginning. The first
    // blank is chosen for the user.
    async look() {
        const of = $('attention-of').value === 'story' ? story : sudoku;
        const {mask, loopStart} = of.model.about;
        const shown = of.shown().tokens;
        const tokens = shown.includes(mask) ? shown : of.run.start;
        if (this.of !== of || this.query >= tokens.length) this.query = -1;
        const query = this.query < 0 ? Math.max(0, tokens.indexOf(mask)) : this.query;
        const loops = number('attention-loops');
        $('attention-loops-at').textContent = loops;
        this.turn++;
        const turn = this.turn;
        const {passes} = await ask(of.model.name, 'look', {tokens, loops, query});
        if (turn !== this.turn) return;
        $('attention-pass').max = passes.length - 1;
        if (this.of !== of) $('attention-pass').value = loopStart; // the first loop
        Object.assign(this, {of, tokens, query, passes});
        this.draw();
    },

    draw() {
        const {layer, loop, weight} = this.passes[number('attention-pass')];
        const {mask, loopStart} = this.of.model.about;
        const isStory = this.of === story;
        const where = loop ? `loop ${loop}` : `${layer < loopStart ? 'before' : 'after'} the loop`;
        $('attention-at').textContent = `Pass ${number('attention-pass') + 1}: layer ${layer + 1}, `
            + where;
        $('attention-board').hidden = isStory;
        $('attention-text').hidden = !isStory;
        const most = Math.max(...weight);
        const part = t => {
            const isBlank = this.tokens[t] === mask;
            const text = isBlank ? (isStory ? ' ____' : '')
                : t === 0 && isStory ? '(begin)' : this.of.model.text([this.tokens[t]]);
            const share = percent(weight[t]);
            return {className: 'seen', textContent: text.replace('\n', ' '), title: share,
                style: {'--p': weight[t] / most}, isChosen: t === this.query,
                name: `${isBlank ? 'blank' : text.trim() || 'line end'}, ${share}`};
        };
        if (!isStory) drawBoard($('attention-board'), part);
        else refill($('attention-text'), this.tokens.map((_, t) => {
            const {name, isChosen, className, ...rest} = part(t);
            return make('button', {type: 'button', className: `word ${className}`,
                attributes: {'aria-label': name, 'aria-pressed': isChosen}, data: {position: t},
                ...rest});
        }));
    },
};
