/*
Runs the models, so that the page never waits. A message {task, model, what, ...} is answered by
{task, shown} for each denoising step, and at the end by {task, done} or {task, error}.
*/
import {Engine} from './loopmdm.js';

const FOLDERS = ['stories', 'sudoku'];

async function fetchBytes(url) {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`cannot load ${url}: ${answer.status}`);
    return new Uint8Array(await answer.arrayBuffer());
}

const files = Promise.all(['loopmdm.wasm', ...FOLDERS.flatMap(
    folder => [`models/${folder}/model.bin`, `models/${folder}/tokenizer.bin`])].map(fetchBytes));

async function open() {
    const [wasm, ...others] = await files;
    const engine = await Engine.load(wasm);
    return Object.fromEntries(FOLDERS.map((folder, i) =>
        [folder, engine.open(folder, others[2 * i], others[2 * i + 1])]));
}

let models = open(); // a promise

const functions = {
    // What the page must know of a model.
    about: ({T, mask, eot, loopStart, bytes}) => ({T, mask, eot, loopStart, bytes}),
    encode: (model, {text}) => model.encode(text),
    sample: (model, {tokens, options}, show) => model.sample(tokens, options, show),
    look: (model, {tokens, loops, query}) => model.look(tokens, loops, query),
};

onmessage = async ({data}) => {
    const {task, what, model} = data;
    try {
        const opened = (await models)[model];
        const done = functions[what](opened, data, shown => postMessage({task, shown}));
        postMessage({task, done});
    } catch (error) {
        models = open(); // the program ended with a line: begin anew
        postMessage({task, error: error.message});
    }
};
