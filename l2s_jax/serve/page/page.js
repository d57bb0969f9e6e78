"use strict";

// The race: asks each model of this server for the same prompt, and shows the pieces as they come.

const find = (id) => document.getElementById(id);
const seconds = (ms) => `${(ms / 1000).toFixed(ms < 1000 ? 3 : 2)} s`;

// What the texts are compared with, best first: the first of these that has run.
const REFERENCES = ["llm", "exact", "l2s"];

let runs = []; // of each model: {name, pieces: [{at, text}], first, whole, tokens, failure}
let stopping = null; // an AbortController while something runs or is replayed

function headers() {
  const key = find("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function say(text) {
  find("status").textContent = text;
}

// ---- asking

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(name, settings, signal, show) {
  const run = { name, pieces: [], first: null, whole: null, tokens: null, failure: "" };
  const began = performance.now();
  try {
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({
        ...settings,
        model: name,
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const at = performance.now() - began;
      const text = event.choices.length ? event.choices[0].text : "";
      if (event.choices.length && run.first === null) run.first = at;
      if (text) run.pieces.push({ at, text });
      if (event.usage) run.tokens = event.usage.completion_tokens;
      run.whole = at;
      show(run);
    }
  } catch (error) {
    run.failure = error.name === "AbortError" ? "stopped" : error.message;
    run.whole = performance.now() - began;
  }
  show(run);
  return run;
}

const textOf = (run) => run.pieces.map((piece) => piece.text).join("");

// ---- showing

function makeLane(name) {
  const lane = document.createElement("section");
  const title = document.createElement("h2");
  const said = document.createElement("p");
  const time = document.createElement("p");
  title.id = `lane-${name}`;
  title.textContent = name;
  said.className = "said";
  time.className = "time";
  lane.dataset.model = name;
  lane.setAttribute("aria-labelledby", title.id);
  lane.append(title, said, time);
  return lane;
}

const laneOf = (name) => find("lanes").querySelector(`[data-model="${CSS.escape(name)}"]`);

function show(run, running = true) {
  const lane = laneOf(run.name);
  lane.classList.toggle("running", running);
  lane.querySelector(".said").textContent = textOf(run);
  const told = [];
  if (run.failure) told.push(run.failure);
  if (run.first !== null) told.push(`first token ${seconds(run.first)}`);
  if (run.whole !== null) told.push(`${seconds(run.whole)} in all`);
  lane.querySelector(".time").textContent = told.join(", ");
}

// Words, with the space before each, so that joined they are the text.
const words = (text) => text.match(/\s*\S+|\s+$/g) ?? [];

// Which words of `own` are no part of the longest common subsequence with `other`.
function differing(own, other) {
  const table = Array.from({ length: own.length + 1 }, () => new Uint32Array(other.length + 1));
  for (let i = own.length - 1; i >= 0; i--) {
    for (let j = other.length - 1; j >= 0; j--) {
      const same = own[i].trim() === other[j].trim();
      table[i][j] = same ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  const marked = [];
  let j = 0;
  for (let i = 0; i < own.length; i++) {
    while (j < other.length && own[i].trim() !== other[j].trim() && table[i][j] === table[i][j + 1]) j++;
    const same = j < other.length && own[i].trim() === other[j].trim() && table[i][j] === table[i + 1][j + 1] + 1;
    marked.push(!same);
    if (same) j++;
  }
  return marked;
}

function markDifferences() {
  const whole = runs.filter((run) => !run.failure);
  const reference = REFERENCES.map((name) => whole.find((run) => run.name === name)).find(Boolean);
  if (!reference || whole.length < 2) return null;
  const expected = words(textOf(reference));
  for (const run of whole) {
    const own = words(textOf(run));
    const marks = differing(own, expected);
    run.differs = marks.some(Boolean) || own.length !== expected.length;
    const said = laneOf(run.name).querySelector(".said");
    said.replaceChildren(
      ...own.map((word, i) => {
        if (!marks[i]) return document.createTextNode(word);
        const mark = document.createElement("mark");
        mark.textContent = word;
        return mark;
      }),
    );
  }
  return reference.name;
}

function tabulate(reference) {
  const body = find("results").querySelector("tbody");
  body.replaceChildren(
    ...runs.map((run) => {
      const row = document.createElement("tr");
      const cell = (tag, text) => {
        const made = document.createElement(tag);
        made.textContent = text;
        row.append(made);
        return made;
      };
      cell("th", run.name).scope = "row";
      cell("td", run.first === null ? "" : seconds(run.first));
      cell("td", run.whole === null ? "" : seconds(run.whole));
      cell("td", run.tokens ?? "");
      cell("td", run.tokens ? (run.tokens / (run.whole / 1000)).toFixed(1) : "");
      let text = run.failure;
      if (!text && reference) {
        if (run.name === reference) text = "what the others are compared with";
        else text = run.differs ? `differs from that of ${reference}` : `the same as that of ${reference}`;
      }
      cell("td", text);
      return row;
    }),
  );
  find("results").hidden = false;
}

// ---- running

function chosen() {
  return [...find("models").querySelectorAll("input:checked")].map((box) => box.value);
}

function busy(controller) {
  stopping = controller;
  find("run").disabled = Boolean(controller);
  find("stop").disabled = !controller;
  find("replay").disabled = Boolean(controller) || !runs.length;
}

async function race() {
  const names = chosen();
  if (!names.length) {
    say("Choose a model.");
    return;
  }
  const controller = new AbortController();
  const settings = {
    prompt: find("prompt").value,
    max_tokens: Number(find("tokens").value),
    temperature: Number(find("temperature").value),
    seed: Number(find("seed").value),
  };
  const signal = controller.signal;
  runs = [];
  find("results").hidden = true;
  find("lanes").replaceChildren(...names.map(makeLane));
  busy(controller);
  if (document.querySelector("input[name=order]:checked").value === "together") {
    say("All run.");
    runs = await Promise.all(names.map((name) => ask(name, settings, signal, show)));
  } else {
    for (const name of names) {
      if (signal.aborted) break;
      say(`${name} runs.`);
      runs.push(await ask(name, settings, signal, show));
      show(runs.at(-1), false);
    }
  }
  runs.forEach((run) => show(run, false));
  const reference = markDifferences();
  tabulate(reference);
  busy(null);
  const failed = runs.filter((run) => run.failure).map((run) => `${run.name}: ${run.failure}`);
  say(failed.join(" ") || `Done.${reference ? ` Marked words differ from the text of ${reference}.` : ""}`);
}

// Every answer again, from one start, at the pace that it was measured with.
async function replay() {
  const controller = new AbortController();
  const whole = runs.filter((run) => run.pieces.length);
  busy(controller);
  say("A replay, at the pace that was measured.");
  const began = performance.now();
  await new Promise((resolve) => {
    function frame() {
      const now = performance.now() - began;
      let left = false;
      for (const run of whole) {
        const over = now >= run.whole;
        left ||= !over;
        show(
          {
            ...run,
            pieces: run.pieces.filter((piece) => piece.at <= now),
            first: run.first <= now ? run.first : null,
            whole: over ? run.whole : now,
          },
          !over,
        );
      }
      if (left && !controller.signal.aborted) requestAnimationFrame(frame);
      else resolve();
    }
    frame();
  });
  runs.forEach((run) => show(run, false));
  markDifferences();
  busy(null);
  say("Done.");
}

// ---- starting

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (response.status === 401) find("key-row").hidden = false;
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response.json();
}

async function start() {
  let models;
  try {
    models = (await get("v1/models")).data;
  } catch (error) {
    say(error.message);
    return;
  }
  const most = Math.min(...models.map((model) => model.max_new_tokens));
  find("tokens").max = most;
  find("tokens").value ||= most;
  find("models").replaceChildren(
    ...models.map(({ id }) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      box.type = "checkbox";
      box.value = id;
      box.checked = true;
      label.append(box, ` ${id}`);
      return label;
    }),
  );
  const { examples } = await get("examples");
  find("examples-row").hidden = !examples.length;
  find("examples").replaceChildren(
    new Option("choose", ""),
    ...examples.map((text) => new Option(text.length > 90 ? `${text.slice(0, 90)}...` : text, text)),
  );
  say("");
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  race();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !stopping) find("ask").requestSubmit();
});
find("stop").addEventListener("click", () => stopping?.abort());
find("replay").addEventListener("click", replay);
find("examples").addEventListener("change", () => {
  if (find("examples").value) find("prompt").value = find("examples").value;
});
find("key").addEventListener("change", start);
start();
