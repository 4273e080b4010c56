/*
loopmdm.wasm for a page, a worker or node: hands it files, and takes what it shows.

    const engine = await Engine.load(bytes of loopmdm.wasm)
    const model = engine.open('stories', bytes of model.bin, bytes of tokenizer.bin)
    const tokens = model.encode('Kate had a ____.')
    model.sample(tokens, {loops: 2, steps: 8, order: 'confidence', temperature: 0, seed: 1}, show)

A position that is blank holds the token model.mask. An Error has the line that the program prints.
*/

export const ORDERS = ['random', 'confidence', 'margin', 'entropy'];

export class Engine {
    static async load(bytes) {
        const engine = new Engine();
        const {instance} = await WebAssembly.instantiate(bytes, engine.imports());
        engine.wasm = instance.exports;
        engine.wasm._initialize();
        engine.said = '';
        return engine;
    }

    imports() {
        const show = (what, ...values) => this.show && this.show(what, ...values);
        return {
            page: {
                step: (step, x, guess, p) => show('step', step, x, guess, p),
                loop: (loop, guess, p) => show('loop', loop, guess, p),
                attention: (pass, layer, weight) => show('attention', pass, layer, weight),
            },
            // What the C library asks of a system. Here it has a standard error and no more.
            wasi_snapshot_preview1: {
                fd_write: (file, pieces, n, written) => this.write(pieces, n, written),
                fd_seek: () => 0,
                fd_fdstat_get: () => 0,
                proc_exit: () => { throw new Error(this.said.trim() || 'the program ended'); },
            },
        };
    }

    write(pieces, n, written) {
        const view = new DataView(this.wasm.memory.buffer);
        let bytes = 0;
        for (let i = 0; i < n; i++) {
            const at = view.getUint32(pieces + 8 * i, true);
            const length = view.getUint32(pieces + 8 * i + 4, true);
            this.said += new TextDecoder().decode(new Uint8Array(view.buffer, at, length));
            bytes += length;
        }
        view.setUint32(written, bytes, true);
        return 0;
    }

    // The memory moves when it grows, so each use looks at it anew.
    ints(at, n) { return Array.from(new Int32Array(this.wasm.memory.buffer, at, n)); }
    floats(at, n) { return Array.from(new Float32Array(this.wasm.memory.buffer, at, n)); }

    // Calls use(address) with a text in the memory, and returns what it returns.
    withText(text, use) {
        const bytes = new TextEncoder().encode(text + '\0');
        const at = this.wasm.malloc(bytes.length);
        new Uint8Array(this.wasm.memory.buffer).set(bytes, at);
        const result = use(at);
        this.wasm.free(at);
        return result;
    }

    addFile(name, bytes) {
        const at = this.withText(name, text => this.wasm.web_file(text, bytes.length));
        new Uint8Array(this.wasm.memory.buffer).set(bytes, at);
    }

    // Opens a model. Both files are Uint8Arrays.
    open(name, model, tokenizer) {
        this.addFile(`${name}/model.bin`, model);
        this.addFile(`${name}/tokenizer.bin`, tokenizer);
        return new Model(this, this.withText(name, text => this.wasm.web_open(text)));
    }
}

class Model {
    constructor(engine, number) {
        Object.assign(this, {engine, number});
        const {wasm} = engine;
        [this.T, this.mask, this.loopStart, this.loopEnd, this.eot] =
            engine.ints(wasm.web_shape(number), 5);

        const length = wasm.malloc(4);
        this.bytes = []; // of each token
        for (let id = 0; id < this.mask; id++) {
            const at = wasm.web_token(number, id, length);
            const n = engine.ints(length, 1)[0];
            this.bytes.push(new Uint8Array(wasm.memory.buffer, at, n).slice());
        }
        wasm.free(length);
    }

    // Tokens of a text, in which ____ is a blank. An end-of-text comes first.
    encode(text) {
        const {engine, number} = this;
        const n = engine.withText(text, at => engine.wasm.web_encode(number, at));
        return engine.ints(engine.wasm.web_tokens(n), n);
    }

    setTokens(tokens) {
        const at = this.engine.wasm.web_tokens(tokens.length);
        new Int32Array(this.engine.wasm.memory.buffer, at, tokens.length).set(tokens);
    }

    // Fills in the blanks, and returns the tokens. show({step, tokens, guess, probability}) gets
    // each denoising step: guess is the likeliest token of what was blank before it (else mask).
    // block: so many positions at a time, from left to right; without it all.
    sample(tokens, {loops, steps, order, block, temperature, seed}, show = () => {}) {
        const {engine, number} = this;
        const T = tokens.length;
        let last = tokens;
        engine.show = (what, step, x, guess, p) => {
            last = engine.ints(x, T);
            show({step, tokens: last, guess: engine.ints(guess, T),
                probability: engine.floats(p, T)});
        };
        this.setTokens(tokens);
        engine.wasm.web_sample(number, T, loops, steps, ORDERS.indexOf(order), block || T,
            temperature, seed);
        return last;
    }

    // One forward, from inside. Returns {loops: [{guess, probability}], passes: [{layer, loop,
    // weight}]}: what the blanks would become after each loop, and, for each pass through a layer,
    // how much position `query` attends to each position. query = -1: no passes.
    look(tokens, loops, query = -1) {
        const {engine, number} = this;
        const T = tokens.length;
        const seen = {loops: [], passes: []};
        engine.show = (what, ...values) => {
            if (what === 'loop') {
                const [, guess, p] = values;
                seen.loops.push({guess: engine.ints(guess, T), probability: engine.floats(p, T)});
            } else {
                const [pass, layer, weight] = values;
                seen.passes.push({layer, loop: this.loopOfPass(pass, layer),
                    weight: engine.floats(weight, T)});
            }
        };
        this.setTokens(tokens);
        engine.wasm.web_look(number, T, loops, query);
        return seen;
    }

    // The loop that a pass belongs to, from 1; 0 before and after the loop.
    loopOfPass(pass, layer) {
        if (layer < this.loopStart || layer >= this.loopEnd) return 0;
        return 1 + Math.floor((pass - this.loopStart) / (this.loopEnd - this.loopStart));
    }
}
