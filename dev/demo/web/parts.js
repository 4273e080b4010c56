// What the three views share.

export const $ = id => document.getElementById(id);
export const percent = p => `${Math.round(100 * p)} %`;
export const status = text => { $('status').textContent = text; };

// The number in a field. One that is not possible is an error, and the user is taken there.
export function number(id) {
    const field = $(id);
    if (field.checkValidity()) return Number(field.value);
    const details = field.closest('details');
    if (details) details.open = true;
    field.focus();
    const kind = field.step === 'any' ? 'number' : 'whole number';
    const name = field.labels[0].textContent.trim();
    throw new Error(`${name}: give a ${kind} from ${field.min} to ${field.max}.`);
}

// ---- the worker ----

const worker = new Worker('worker.js', {type: 'module'});
const waiting = new Map(); // task number -> {resolve, reject, show}
let asked = 0;

worker.onmessage = ({data}) => {
    const task = waiting.get(data.task);
    if (data.shown) return task.show(data.shown);
    waiting.delete(data.task);
    if (data.error) task.reject(new Error(data.error));
    else task.resolve(data.done);
};
worker.onerror = event => status(`The models cannot run here: ${event.message || 'no reason'}`);

// A promise of what a function of worker.js returns. show() gets what comes before.
export function ask(model, what, values = {}, show = () => {}) {
    asked++;
    return new Promise((resolve, reject) => {
        waiting.set(asked, {resolve, reject, show});
        worker.postMessage({task: asked, model, what, ...values});
    });
}

// Runs an action of the user. What goes wrong becomes the status.
export async function act(action) {
    status('');
    try {
        await action();
    } catch (error) {
        status(error.message);
    }
}

// ---- elements ----

// An element with properties, and with attributes, styles and data of their own.
export function make(tag, {attributes = {}, style = {}, data = {}, ...properties} = {},
    ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
    Object.assign(element.dataset, data);
    element.append(...children);
    return element;
}

const buttonsOf = container => [...container.querySelectorAll('button')];

// Of a group of buttons only the last one that had the focus is in the order of tabs. Arrow keys go
// to the others; `columns` of them are a row.
export function rove(container, columns = Infinity) {
    container.addEventListener('focusin', ({target}) => {
        for (const button of buttonsOf(container)) button.tabIndex = button === target ? 0 : -1;
    });
    container.addEventListener('keydown', event => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        const buttons = buttonsOf(container);
        const at = buttons.indexOf(document.activeElement);
        const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns};
        const next = buttons[at + move[event.key]];
        if (at < 0 || !next) return;
        event.preventDefault();
        next.focus();
    });
}

// Replaces the buttons of such a group. The focus stays where it was.
export function refill(container, children) {
    const before = buttonsOf(container);
    const focused = before.includes(document.activeElement);
    const at = before.findIndex(button => button.tabIndex === 0);
    container.replaceChildren(...children);
    const buttons = buttonsOf(container);
    const next = Math.max(0, Math.min(at, buttons.length - 1));
    buttons.forEach((button, i) => { button.tabIndex = i === next ? 0 : -1; });
    if (focused && buttons.length) buttons[next].focus();
}

// A button that shows one step after the other. step(isFirst) returns whether there are more.
export function play(button, step) {
    let playing = null;
    button.addEventListener('click', async () => {
        const mine = playing ? null : {};
        playing = mine;
        button.textContent = mine ? 'Stop' : 'Play';
        for (let isFirst = true; mine && playing === mine; isFirst = false) {
            if (await step(isFirst)) {
                await new Promise(resolve => setTimeout(resolve, 150));
            } else if (playing === mine) {
                playing = null;
                button.textContent = 'Play';
            }
        }
    });
}

// Says which step of a run a view shows: beside its slider, and to who only hears the slider.
export function sayStep(view, {step}, {steps}) {
    const text = `${step} of ${steps}`;
    $(`${view}-at`).textContent = text;
    $(`${view}-step`).setAttribute('aria-valuetext', text);
}

// ---- a run of the sampler, which two views show step by step ----

export class Run {
    constructor(model) {
        Object.assign(this, {model, history: []});
    }

    get start() { return this.history[0].tokens; }

    isBlank(tokens, t) { return tokens[t] === this.model.about.mask; }

    // final: the tokens of the last step so far, whatever the user changes in the history.
    begin(tokens, steps = 0) {
        const none = tokens.map(() => this.model.about.mask);
        this.history = [{step: 0, tokens, guess: none, probability: tokens.map(() => 1)}];
        Object.assign(this, {steps, final: tokens});
    }

    // Fills in the blanks of tokens. Calls shown() at the beginning and after each step.
    async fill(tokens, options, shown) {
        if (!tokens.includes(this.model.about.mask))
            throw new Error('There is no blank to fill in.');
        this.begin(tokens, options.steps);
        const history = this.history;
        shown();
        await ask(this.model.name, 'sample', {tokens, options}, state => {
            history.push(state);
            if (history !== this.history) return; // another one has begun
            this.final = state.tokens;
            shown();
        });
    }
}
