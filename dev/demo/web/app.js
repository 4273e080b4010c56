// The page: three views of two models, which worker.js runs.

import {$, act, ask, rove, status} from './parts.js';
import {attention} from './attention.js';
import {story} from './story.js';
import {sudoku} from './sudoku.js';

function openTab(tab) {
    if (tab.getAttribute('aria-selected') === 'true') return;
    for (const other of document.querySelectorAll('[role="tab"]')) {
        other.setAttribute('aria-selected', other === tab);
        $(other.getAttribute('aria-controls')).hidden = other !== tab;
    }
    if (tab.id === 'tab-attention') act(() => attention.look());
}

const tabs = document.querySelector('[role="tablist"]');
tabs.addEventListener('click', ({target}) => target.closest('[role="tab"]') && openTab(target));
tabs.addEventListener('focusin', ({target}) => openTab(target));
rove(tabs);

// Until the models are there, nothing can be used: index.html has made it inert.
act(async () => {
    status('The models are loading.');
    for (const {model} of [story, sudoku]) {
        model.about = await ask(model.name, 'about');
        const {bytes, eot} = model.about;
        bytes[eot] = new TextEncoder().encode(' (end)'); // more readable than <|endoftext|>
        model.text = ids => new TextDecoder().decode(
            new Uint8Array(ids.flatMap(id => [...bytes[id]])));
    }
    await Promise.all([story, sudoku, attention].map(view => view.open()));
    for (const element of document.querySelectorAll('[inert]')) element.inert = false;
    status('');
    document.body.dataset.ready = 'yes';
});
