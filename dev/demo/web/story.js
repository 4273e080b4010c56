// The first view: a story that is filled in, step by step.

import {$, Run, act, ask, make, number, percent, play, refill, rove,
    sayStep} from './parts.js';

export const story = {
    model: {name: 'stories'},

    async open() {
        this.run = new Run(this.model);
        rove($('story-text'));
        $('story-form').addEventListener('submit', event => {
            event.preventDefault();
            const again = event.submitter && event.submitter.id === 'story-again';
            act(() => again ? this.fill(this.shown().tokens) : this.write());
        });
        $('story-step').addEventListener('input', () => this.draw());
        $('story-text').addEventListener('click', ({target}) => this.click(target));
        play($('story-play'), isFirst => {
            $('story-step').value = isFirst ? 0 : number('story-step') + 1;
            this.draw();
            return number('story-step') < this.run.history.length - 1;
        });
        await this.write();
    },

    shown() { return this.run.history[number('story-step')]; },

    async write() {
        const {T, mask} = this.model.about;
        const tokens = await ask('stories', 'encode', {text: $('story-start').value.trim()});
        if (tokens.length > T)
            throw new Error(`The text has ${tokens.length} tokens; ${T} are possible.`);
        if (!tokens.includes(mask)) // a beginning: the rest is blank
            while (tokens.length < T) tokens.push(mask);
        await this.fill(tokens);
    },

    async fill(tokens) {
        const options = {loops: number('story-loops'), steps: number('story-steps'),
            order: $('story-order').value, block: number('story-block'),
            temperature: number('story-temperature'), seed: number('story-seed')};
        const blanks = [...tokens.keys()].filter(t => tokens[t] === this.model.about.mask);
        const blocks = new Set(blanks.map(t => Math.floor(t / options.block))).size;
        if (blocks > options.steps)
            throw new Error(`There are blanks in ${blocks} blocks: give as many denoising steps.`);
        await this.run.fill(tokens, options, () => { // shows the newest step
            const last = this.run.history.length - 1;
            Object.assign($('story-step'), {max: last, value: last});
            this.draw();
        });
        $('story-text').dataset.tokens = this.run.final.join(' ');
    },

    // Groups of positions, up to the end of the story: a word begins with a space, and a blank is a
    // word.
    words() {
        const {eot, mask} = this.model.about;
        const {tokens} = this.shown();
        const end = this.run.final.indexOf(eot, 1);
        const words = [];
        for (let t = 1; t < (end < 0 ? tokens.length : end); t++) {
            const joins = words.length && tokens[t] !== mask && tokens[t - 1] !== mask
                && !/^\s/.test(this.model.text([tokens[t]]));
            if (joins) words[words.length - 1].push(t);
            else words.push([t]);
        }
        return words;
    },

    draw() {
        const state = this.shown();
        sayStep('story', state, this.run);
        refill($('story-text'), this.words().flatMap(word => this.drawWord(word, state)));
    },

    // A button for a word or a blank, after its line ends.
    drawWord(word, {tokens, guess, probability}) {
        const blank = this.run.isBlank(tokens, word[0]);
        const unknown = blank && this.run.isBlank(guess, word[0]);
        const ids = word.map(t => blank ? guess[t] : tokens[t]);
        const text = unknown ? ' ____' : this.model.text(ids);
        const filled = !blank && word.some(t => this.run.isBlank(this.run.start, t));
        const p = Math.min(...word.map(t => probability[t]));
        const name = (blank ? 'blank, perhaps ' : '') + (unknown ? '?' : text.trim() || 'line end')
            + (filled ? `, ${percent(p)}` : '');
        const button = make('button', {type: 'button', textContent: text.replaceAll('\n', ''),
            className: `word${blank ? ' blank' : ''}${filled ? ' filled' : ''}`, title: name,
            attributes: {'aria-label': name}, style: {'--p': p},
            data: {positions: word.join(' ')}});
        return [...Array.from(text.matchAll(/\n/g), () => make('br')), button];
    },

    // A word that is clicked becomes blank; a blank gets the word of the last step.
    click({dataset}) {
        if (!dataset.positions) return;
        const state = this.shown();
        state.tokens = [...state.tokens];
        state.guess = state.tokens.map(() => this.model.about.mask);
        for (const t of dataset.positions.split(' ').map(Number))
            state.tokens[t] = this.run.isBlank(state.tokens, t) ? this.run.final[t]
                : this.model.about.mask;
        this.draw();
    },
};
