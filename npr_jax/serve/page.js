// The page of a server: asks questions, and lets the tree of every answer grow as it is decoded.

const STREAMS = 5;  // at a time: a browser has six connections to a server, and a stop needs one
const KEPT = 20;  // answers on the page
const PATIENCE = 3000;  // ms that a stopped answer may take to say what it was
const KEY = "npr_jax.key";

const [askForm, keyForm, list, hint, dialog] =
  ["ask", "key", "answers", "hint", "viewer-dialog"].map((id) => document.getElementById(id));
const number = (n) => n.toLocaleString("en");
const counted = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

// What went wrong, in words for whoever asked.
class Trouble extends Error {}

// A response of the server; raises Trouble for one that refuses.
async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, {...options, headers, cache: "no-store"});
  } catch {
    throw new Trouble("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  let told = response.statusText;
  try {
    told = (await response.json()).error.message;
  } catch { /* a proxy's page, perhaps: the status has to do */ }
  const later = response.headers.get("retry-after");
  throw new Trouble(`${response.status}: ${told}${later ? ` (Retry after ${later} s.)` : ""}`);
}

// The JSON of server-sent events, up to the one that ends them.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read().catch(() => ({done: true}));
    if (done) throw new Trouble("The connection broke off before the end of the answer.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data:")) continue;  // a comment that keeps the connection alive
      const data = part.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// A tree that grows. Nothing that stands there is ever drawn again: tokens are appended to lines.
class Tree {
  constructor(place) {
    this.lines = new Map([["", this.line(place)]]);
    this.tokens = this.branches = 0;
    this.first = null;  // position of the first token
    this.end = 0;  // after the furthest one
  }

  line(place) {
    return {place, chunk: null, size: 0, tokens: 0, end: 0, forks: 0, open: null};
  }

  hear(event) {
    const line = this.lines.get(event.branch.join(" "));
    if (!line) throw new Error(`no branch ${JSON.stringify(event.branch)} was opened`);
    if (event.event === "tokens") this.write(line, event);
    else if (event.event === "fork") this.fork(line, event);
    else if (event.event === "join") this.join(line, event.position);
  }

  write(line, {position, tokens}) {
    this.first ??= position;
    tokens.forEach((token, i) => this.chunk(line).append(this.token(token, position + i)));
    line.end = position + tokens.length;
    line.tokens += tokens.length;
    if (line.told) line.told.textContent = counted(line.tokens, "token");
    this.tokens += tokens.length;
    this.end = Math.max(this.end, line.end);
  }

  // Where the next token belongs. A chunk ends with a line of text, so that a long answer is laid
  // out piece by piece.
  chunk(line) {
    const {chunk, size} = line;
    const full = chunk && (size >= 4 * CHUNK
      || (size >= CHUNK && chunk.lastChild.textContent.endsWith("\n")));
    if (!chunk || full) {
      const run = chunk ? chunk.parentNode : make("div", {class: "run"});
      if (!chunk) line.place.append(run);
      line.chunk = make("div", {class: "chunk", dir: "auto"});
      line.size = 0;
      run.append(line.chunk);
    }
    line.size += 1;
    return line.chunk;
  }

  token({id, text, logprob, forced}, position) {
    const end = text === "\n" ? " end" : "";
    const span = make("span", {class: `t ${forced ? "forced" : `p${level(100 * logprob)}`}${end}`});
    const odds = forced ? "written by the engine"
      : `log-prob ${logprob.toFixed(2)} (${(100 * Math.exp(logprob)).toFixed(1)}%)`;
    span.title = `id ${id} · position ${position} · ${odds}`;
    span.textContent = visible(text);
    return span;
  }

  fork(line, {branch, branches: count}) {
    const block = line.forks++, lanes = make("div", {class: "lanes open"});
    const path = branch.map(([a, b]) => `${a + 1}.${b + 1} › `).join("");
    lanes.style.setProperty("--n", count);
    const branches = [];
    for (let i = 0; i < count; i++) {
      const name = `branch ${path}${block + 1}.${i + 1}`;
      const told = make("small");
      const column = make("div", {class: `branch a${1 + i % ACCENTS}`, role: "group",
        "aria-label": name}, make("div", {class: "name"}, name, told,
        make("span", {class: "critical"}, "critical path")));
      const child = {...this.line(column), told};
      this.lines.set([...branch, [block, i]].join(" "), child);
      branches.push(child);
      lanes.append(column);
    }
    line.place.append(make("div", {class: "fork", role: "group",
      "aria-label": `block ${block + 1}, ${count} branches side by side`}, lanes));
    line.chunk = null;  // what comes after the join stands below the columns
    line.open = {lanes, branches};
    this.branches += count;
  }

  join(line, position) {
    this.mark(line);
    line.open.lanes.classList.remove("open");
    line.open = null;
    line.end = position;
  }

  // The longest branches of a fork: the trunk waits for them.
  mark({open: {branches}}) {
    const longest = Math.max(...branches.map((branch) => branch.end));
    for (const {end, place} of branches) if (end === longest) place.classList.add("longest");
  }

  // No more comes: of forks that were not joined the longest branches are known now.
  close() {
    for (const line of [...this.lines.values()].reverse()) {
      if (!line.open) continue;
      this.mark(line);
      line.end = Math.max(...line.open.branches.map((branch) => branch.end));
    }
  }

  get critical() {
    return this.first === null ? 0 : this.end - this.first;
  }
}

// A question and its answer.
class Answer {
  constructor(count, asked) {
    this.asked = asked;
    this.running = true;
    this.control = new AbortController();
    this.seed = asked.settings.seed ?? crypto.getRandomValues(new Uint32Array(1))[0];
    this.state = make("p", {class: "state", role: "status"});
    this.open = this.button("View answer", () => show(this.viewer), "open");
    this.stopper = this.button("Stop", () => this.stop());
    this.again = this.button("Ask again", () => ask(asked));
    this.remover = this.button("Remove", () => remove(this));
    this.settings = make("p", {class: "settings"}, this.words().join(" · "));
    this.figures = new Map(["tokens", "tokens/s", "critical path", "speed-up", "branches",
      "first token"].map((name) => [name, make("dd", {}, "–")]));
    this.place = make("div", {class: "tree live", tabindex: "0", role: "region",
      "aria-label": `The tree of answer ${count}, as it grows`});
    this.element = make("article", {class: "answer", "aria-label": `Answer ${count}`},
      make("header", {}, make("h2", {}, `Answer ${count}`), this.state,
        make("div", {class: "buttons"}, this.open, this.stopper, this.again, this.remover)),
      make("p", {class: "asked", dir: "auto"}, visible(asked.question)), this.settings,
      make("dl", {class: "figures"}, ...[...this.figures].map(([name, cell]) =>
        make("div", {}, make("dt", {}, name), cell))), this.place);
    this.tree = new Tree(this.place);
    this.follow = true;  // the end of the tree, until somebody scrolls away from it
    this.place.addEventListener("scroll", () => {
      const {scrollHeight, scrollTop, clientHeight} = this.place;
      this.follow = scrollHeight - scrollTop - clientHeight < 40;
    }, {passive: true});
    this.tell("waiting", "waiting for the server");
  }

  button(text, action, style = "") {
    const made = make("button", {type: "button", class: style}, text);
    made.addEventListener("click", action);
    return made;
  }

  words() {
    const {temperature, max_tokens, parallel} = this.asked.settings;
    const found = [];
    if (temperature !== undefined) found.push(`temperature ${temperature}`);
    if (max_tokens !== undefined) found.push(`at most ${counted(max_tokens, "token")}`);
    return [...found, `seed ${this.seed}`, ...(parallel === false ? ["sequential"] : [])];
  }

  tell(state, text) {
    this.element.dataset.state = state;
    this.state.textContent = visible(text);
    const focused = document.activeElement === this.stopper;
    this.stopper.hidden = !this.running;
    this.again.hidden = this.remover.hidden = this.running;
    this.open.hidden = !this.viewer;
    // The focus stays with the answer whose button has gone.
    if (focused && !this.running) (this.viewer ? this.open : this.again).focus();
  }

  async run() {
    const body = {messages: [{role: "user", content: this.asked.question}], stream: true,
      stream_branches: true, stream_options: {include_usage: true}, ...this.asked.settings,
      seed: this.seed};
    this.sent = performance.now();
    try {
      const response = await send("v1/chat/completions", {method: "POST",
        headers: {"content-type": "application/json"}, body: JSON.stringify(body),
        signal: this.control.signal});
      this.id = response.headers.get("x-request-id");
      for await (const piece of events(response.body)) this.hear(piece);
      if (this.running) throw new Trouble("The answer came without its end.");
    } catch (error) {
      this.fail(error);
    }
    this.draw();
  }

  hear(piece) {
    if (piece.error) throw new Trouble(piece.error.message);
    if (piece.usage) this.tellUsage(piece.usage);
    for (const choice of piece.choices) {
      if (!choice.branch) continue;
      if (choice.branch.event === "finish") this.finish(choice);
      else this.grow(choice.branch);
    }
  }

  grow(event) {
    this.tree.hear(event);
    if (event.event === "tokens") {
      this.last = performance.now();
      // The rate is of what comes after the first tokens: those waited for the prompt.
      this.begun ??= {at: this.last, tokens: this.tree.tokens};
      if (this.element.dataset.state === "waiting") this.tell("running", "answering");
    }
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  // Figures, at most once for each picture that the screen shows.
  draw() {
    this.frame = null;
    const {tokens, critical, branches} = this.tree, begun = this.begun;
    if (!begun) return;
    const seconds = (this.last - begun.at) / 1000;
    const figures = {tokens: number(tokens), "critical path": number(critical),
      "tokens/s": seconds ? number(Math.round((tokens - begun.tokens) / seconds)) : "–",
      "speed-up": `${(tokens / critical).toFixed(2)}×`, branches: number(branches),
      "first token": `${((begun.at - this.sent) / 1000).toFixed(2)} s`};
    for (const [name, text] of Object.entries(figures)) this.figures.get(name).textContent = text;
    if (this.follow) this.place.scrollTop = this.place.scrollHeight;
  }

  finish({finish_reason: reason, finish_detail: detail, branch: {viewer}}) {
    this.close();
    this.viewer = viewer;
    if (reason === "length") this.tell("cut", `cut off by a limit: ${detail || "max tokens"}`);
    else if (reason === "abort") this.tell("stopped", "stopped");
    else if (detail) this.tell("cut", `ended by its format: ${detail}`);
    else this.tell("done", "finished");
  }

  tellUsage({prompt_tokens: prompt, prompt_tokens_details: {cached_tokens: cached}}) {
    const found = cached ? `, ${number(cached)} cached` : "";
    const words = [...this.words(), `prompt of ${counted(prompt, "token")}${found}`];
    this.settings.textContent = words.join(" · ");
  }

  fail(error) {
    if (!this.running) return;  // all was told
    this.close();
    if (this.stopping) this.tell("stopped", "stopped");
    else if (error instanceof Trouble) this.tell("failed", error.message);
    else this.tell("failed", `What the server sent cannot be read: ${error.message}`);
    this.control.abort();
  }

  close() {
    this.running = false;
    this.tree.close();
  }

  // The server ends the answer and says what it was, which can still be viewed. One that has not
  // begun, or whose server does not listen, is left.
  stop() {
    if (!this.id || this.stopping) {
      this.leave();
      return;
    }
    this.stopping = true;
    this.tell(this.element.dataset.state, "stopping");
    send(`v1/requests/${encodeURIComponent(this.id)}`, {method: "DELETE"}).catch(() => {});
    setTimeout(() => this.leave(), PATIENCE);
  }

  // The server ends what nobody listens to.
  leave() {
    this.stopping = true;
    this.control.abort();
  }
}

const answers = [];
let asked = 0;

function ask(wanted) {
  const running = answers.filter((answer) => answer.running).length;
  hint.textContent = running < STREAMS ? ""
    : `${counted(running, "answer")} are being decoded: wait for one, or stop it.`;
  if (running >= STREAMS) return;
  const answer = new Answer(++asked, wanted);
  answers.unshift(answer);
  list.prepend(answer.element);
  if (answers.length > KEPT) remove(answers.findLast((old) => !old.running));
  if (!model) meet();
  answer.run();
}

function remove(answer) {
  const place = answers.indexOf(answer);
  answers.splice(place, 1);
  const focused = answer.element.contains(document.activeElement);
  answer.element.remove();
  if (focused) (answers[place]?.remover ?? askForm.question).focus();
}

function readForm() {
  const settings = {};
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if (askForm[name].value !== "") settings[name] = askForm[name].valueAsNumber;
  }
  if (askForm.sequential.checked && !askForm.sequential.disabled) settings.parallel = false;
  return {question: askForm.question.value, settings};
}

function askForKey() {
  keyForm.hidden = false;
  keyForm.elements.value.focus();
}

// Opens a finished answer in the report's viewer.
async function show({row, packed}) {
  const place = dialog.querySelector(".detail");
  dialog.showModal();
  try {
    new AnswerView(place, row, await unpack(packed));
  } catch (error) {
    place.replaceChildren(make("p", {role: "alert"}, `This answer cannot be shown: ${error}`));
  }
}

function legend() {
  const item = (mark, text) => make("li", {}, mark, text);
  const token = (style) => make("span", {class: `t ${style}`}, "token");
  return make("ul", {class: "legend", "aria-label": "Legend: probability of a token"},
    ...LEVELS.map(([, text], i) => item(token(`p${i}`), text)),
    item(token("forced"), "written by the engine"),
    item(make("span", {class: "critical"}, "critical path"),
      "the branch that the trunk waits for"));
}

let model = null;

// Learns what is served here.
async function meet() {
  const place = document.getElementById("model");
  try {
    model = (await (await send("v1/models")).json()).data[0];
    const {chat_template: template} = await (await send("tokenizer_info")).json();
    place.textContent = visible(`${model.id} · ${model.parallel ? "parallel" : "sequential"} · `
      + `up to ${counted(model.max_model_len, "token")}`);
    askForm.question.placeholder = template ? "A question or a problem"
      : "A text for the model to go on with: it has no chat template. The demo's model takes "
        + "A:7+4;B:6*2;C:7*6?";
    if (model.parallel) return;
    askForm.sequential.checked = askForm.sequential.disabled = true;
    document.getElementById("tags").textContent = "this model has no tags for branches";
  } catch (error) {
    place.textContent = error.message;
  }
}

askForm.addEventListener("submit", (event) => {
  event.preventDefault();
  ask(readForm());
});
askForm.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  askForm.requestSubmit();
});
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, keyForm.elements.value.value.trim());
  keyForm.hidden = true;
  meet();
  askForm.question.focus();
});
// A browser may keep a page that was left, and its connections with it.
addEventListener("pagehide", () => answers.forEach((answer) => answer.leave()));
dialog.addEventListener("close", () => dialog.querySelector(".detail").replaceChildren());
document.getElementById("legend").append(legend());
meet();
