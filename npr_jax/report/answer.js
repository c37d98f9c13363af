// One answer of the viewer: drawn as a tree and as a timeline, explored token by token.

const CHUNK = 200;  // tokens of a run that are drawn together, once they come into sight

// Draws an answer into `place`, and lets mouse and keys go over its tokens.
class AnswerView {
  constructor(place, row, answer) {
    this.answer = answer;
    this.spans = new Array(answer.ids.length);
    this.chunks = [];
    this.seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) this.fill(entry.target);
    }, {rootMargin: "400px"});
    this.now = -1;
    this.inspector = make("div", {class: "inspector", role: "status"});
    this.tree = make("div", {class: "tree", tabindex: "0", role: "group", "aria-label":
      "Tokens of the answer. Left and right: token by token. Up and down: from branch to branch."});
    const prompt = make("div", {class: "run prompt"});
    const details = make("details", {class: "fold"},
      make("summary", {}, `Prompt as the model saw it, ${answer.promptLen} tokens`), prompt);
    details.addEventListener("toggle", () => {
      if (!prompt.childNodes.length) this.run(prompt, [0, answer.promptLen]);
    });
    this.line(this.tree, answer.tree);
    const timeline = this.timeline();
    const scroll = make("div", {class: "scroll"}, this.head(row),
      make("h4", {}, "Problem"), make("p", {class: "text", dir: "auto"}, visible(answer.problem)),
      details, this.verdict(),
      make("h4", {}, "Timeline", make("small", {}, "which line decoded at which step")), timeline,
      this.waits(row),
      make("h4", {}, "Tree", make("small", {}, "branches side by side; none sees another")),
      this.legend(), this.tree);
    place.replaceChildren(scroll, this.inspector);
    for (const target of [this.tree, prompt]) {
      target.addEventListener("pointerover", (event) => this.hover(event));
      target.addEventListener("click", (event) => this.hover(event));
      target.addEventListener("pointerleave", () => this.inspect(this.now));
    }
    for (const target of [this.tree, timeline]) {
      target.addEventListener("keydown", (event) => this.key(event));
      target.addEventListener("focus", () => {
        if (this.now < 0) this.select(Math.min(answer.promptLen, answer.ids.length - 1));
      });
    }
    this.inspect(-1);
  }

  head(row) {
    const title = [row.id || "answer", `sample ${row.sample}`].map(visible).join(" · ");
    const figures = [["tokens", row.tokens], ["critical path", row.critical],
      ["decode steps", this.answer.numSteps], ["width", row.width], ["branches", row.branches],
      ["depth", row.depth]];
    return make("header", {},
      make("h3", {tabindex: "-1"}, title, make("small", {}, visible(row.group))),
      make("dl", {class: "figures"}, ...figures.map(([name, value]) =>
        make("div", {}, make("dt", {}, name), make("dd", {}, value.toLocaleString("en"))))));
  }

  // Why an answer takes more steps than its critical path: nobody should take it for idleness.
  waits(row) {
    const {lines, numSteps} = this.answer;
    if (lines.length < 2 || numSteps <= row.critical) return "";
    const count = (n, word) => `${n.toLocaleString("en")} ${word}`;
    return make("p", {class: "waits"}, `${count(numSteps, "decode steps")} for a critical path of `
      + `${count(row.critical, "tokens")}: where no line decodes, before branches and before a `
      + "takeaway, the engine waits for a tag. It asks for several steps at a time, and reads their "
      + "tokens while the next ones run; only then can it fork or join.");
  }

  verdict() {
    const {correct, prediction, reference, violations, finish, detail} = this.answer;
    const [kind, mark] = correct === null ? ["none", "– not judged"]
      : correct ? ["right", "✓ right"] : ["wrong", "✗ wrong"];
    const cell = (name, text) => make("div", {}, make("dt", {}, name),
      make("dd", {dir: "auto"}, text === null ? "none" : visible(text)));
    const ended = finish + (detail ? `: ${detail}` : "");
    const box = make("div", {class: `verdict ${kind}`}, make("strong", {}, mark),
      make("dl", {}, cell("answer", prediction), cell("reference", reference),
        cell("finished by", ended)));
    if (violations.length) {
      box.append(make("ul", {"aria-label": "Rules of the format that are broken"},
        ...violations.map((text) => make("li", {}, visible(text)))));
    }
    return box;
  }

  legend() {
    const item = (style, text) => make("li", {}, make("span", {class: `t ${style}`}, "token"), text);
    return make("ul", {class: "legend", "aria-label": "Legend: probability of a token"},
      ...LEVELS.map(([, text], i) => item(`p${i}`, text)),
      item("forced", "written by the engine"));
  }

  // Tokens of a run, in chunks that end with a line of text. A chunk is plain text until it comes
  // near the window; then it gets a span per token.
  run(place, [start, end]) {
    const {pieces} = this.answer;
    for (let from = start; from < end;) {
      let to = Math.min(from + CHUNK, end);
      while (to < end && to < from + 4 * CHUNK && !pieces[to - 1].endsWith("\n")) to += 1;
      const chunk = make("div", {class: "chunk", dir: "auto"},
        visible(pieces.slice(from, to).join("")));
      chunk.range = [from, to];
      this.chunks.push(chunk);
      this.seen.observe(chunk);
      place.append(chunk);
      from = to;
    }
  }

  // Turns the plain text of a chunk into spans.
  fill(chunk) {
    const {pieces, logp, forced, promptLen} = this.answer;
    const [from, to] = chunk.range;
    if (this.spans[from]) return;
    const made = [];
    for (let i = from; i < to; i++) {
      const span = document.createElement("span");
      span.className = i < promptLen ? "t" : forced[i] ? "t forced" : `t p${level(logp[i])}`;
      if (pieces[i] === "\n") span.className += " end";
      span.textContent = visible(pieces[i]);
      span.token = i;
      this.spans[i] = span;
      made.push(span);
    }
    chunk.replaceChildren(...made);
    this.seen.unobserve(chunk);
  }

  // The span of a token, which may have to be made.
  span(i) {
    if (!this.spans[i]) {
      const chunk = this.chunks.find(({range: [from, to]}) => from <= i && i < to);
      if (chunk) this.fill(chunk);
    }
    return this.spans[i];
  }

  line(place, line) {
    for (const {run, branches, joined, block} of line.parts) {
      if (run[0] < run[1]) {
        const text = make("div", {class: "run"});
        this.run(text, run);
        place.append(text);
      }
      if (!branches.length) continue;
      const lanes = make("div", {class: `lanes${joined ? "" : " open"}`});
      lanes.style.setProperty("--n", branches.length);
      for (const branch of branches) {
        const steps = this.stepsOf(branch);
        const title = make("button", {type: "button", class: "name"}, `branch ${branch.name}`,
          make("small", {}, steps ? `steps ${steps[0]} to ${steps[1]}` : "not sampled"));
        title.addEventListener("click", () => this.select(branch.start, true));
        if (branch.score !== undefined) {
          const score = make("small", {class: "score"}, `right: ${Math.round(100 * branch.score)}%`);
          score.style.setProperty("--score", `${100 * branch.score}%`);
          title.append(score);
        }
        const column = make("div", {class: `branch a${branch.accent}`, role: "group",
          "aria-label": `branch ${branch.name}`}, title);
        this.line(column, branch);
        lanes.append(column);
      }
      place.append(make("div", {class: "fork", role: "group",
        "aria-label": `block ${block}, ${branches.length} branches side by side`}, lanes));
    }
  }

  // First and last decode step of a line's own tokens.
  stepsOf(line) {
    let first = Infinity, last = -1;
    for (const {run: [start, end]} of line.parts) {
      for (let i = start; i < end; i++) {
        const step = this.answer.steps[i];
        if (step >= 0) first = Math.min(first, step), last = Math.max(last, step);
      }
    }
    return last < 0 ? null : [first, last];
  }

  timeline() {
    const {lines, steps, numSteps} = this.answer;
    const box = make("div", {class: "timeline", tabindex: "0", role: "group", "aria-label":
      `Timeline, ${lines.length} lines over ${numSteps} decode steps. Arrow keys move as in the tree.`});
    if (!numSteps) {
      box.append(make("p", {}, "No token of this answer was sampled."));
      return box;
    }
    const rows = make("div", {class: "rows"});
    const gap = Math.max(1, numSteps / 500);  // steps that are not worth an element of their own
    this.cursor = make("div", {class: "cursor", hidden: ""});
    for (const line of lines) {
      const track = make("div", {class: `track a${line.accent}`});
      track.line = line;
      let begin = -1, last = -1;
      const bar = () => {
        const made = make("i");
        made.style.left = `${100 * begin / numSteps}%`;
        made.style.width = `${100 * (last + 1 - begin) / numSteps}%`;
        track.append(made);
      };
      for (const {run: [start, end]} of line.parts) {
        for (let i = start; i < end; i++) {
          if (steps[i] < 0) continue;
          if (begin >= 0 && steps[i] - last > gap) bar(), begin = -1;
          if (begin < 0) begin = steps[i];
          last = steps[i];
        }
      }
      if (begin >= 0) bar();
      const name = make("div", {class: "label"}, line.name);
      rows.append(name, track);
    }
    const marks = [0, Math.floor((numSteps - 1) / 2), numSteps - 1];
    const axis = make("div", {class: "axis"}, ...[...new Set(marks)].map((step) =>
      make("span", {}, step.toLocaleString("en"))));
    box.append(rows, make("div", {class: "label"}, "step"), axis);
    rows.append(make("div", {class: "over"}, this.cursor));
    const find = (event) => {
      const track = event.target.closest(".track");
      if (!track) return -1;
      const frame = track.getBoundingClientRect();
      return this.at(track.line, Math.floor((event.clientX - frame.left) / frame.width * numSteps));
    };
    rows.addEventListener("pointermove", (event) => {
      const i = find(event);
      if (i >= 0) this.inspect(i);
    });
    rows.addEventListener("pointerleave", () => this.inspect(this.now));
    rows.addEventListener("click", (event) => {
      const i = find(event);
      if (i >= 0) this.select(i, true);
    });
    return box;
  }

  // The token of a line that was decoded next to a step; -1 where the line has none.
  at(line, step) {
    let best = -1, least = Infinity;
    for (const {run: [start, end]} of line.parts) {
      for (let i = start; i < end; i++) {
        const away = Math.abs(this.answer.steps[i] - step);
        if (this.answer.steps[i] >= 0 && away < least) best = i, least = away;
      }
    }
    return best;
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || this.now < 0) return;
    if (event.target.closest("button")) return;
    const {promptLen, ids, lines, lineOf, steps} = this.answer;
    let target = -1;
    const line = lineOf[this.now];
    if (event.key === "ArrowRight") target = this.now + 1;
    else if (event.key === "ArrowLeft") target = this.now - 1;
    else if (event.key === "Home") target = lines[line].start;
    else if (event.key === "End") target = lines[line].end - 1;
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const change = event.key === "ArrowDown" ? 1 : -1;
      for (let n = line + change; n >= 0 && n < lines.length && target < 0; n += change) {
        let near = this.now;  // a forced token has no step: that of the one before it
        while (near > promptLen && steps[near] < 0) near -= 1;
        target = this.at(lines[n], Math.max(steps[near], 0));
      }
    } else return;
    event.preventDefault();
    if (target >= promptLen && target < ids.length) this.select(target, true);
  }

  hover(event) {
    const span = event.target.closest(".t");
    if (!span || span.token === undefined) return;
    if (event.type === "click") this.select(span.token);
    else this.inspect(span.token);
  }

  // Makes a token the current one; `reveal` brings it into sight.
  select(i, reveal = false) {
    this.spans[this.now]?.classList.remove("now");
    this.now = i;
    const span = this.span(i);
    span?.classList.add("now");
    if (reveal) span?.scrollIntoView({block: "nearest", inline: "nearest"});
    this.inspect(i);
  }

  // Shows what is known of a token.
  inspect(i) {
    const {pieces, ids, logp, positions, steps, forced, lines, lineOf, promptLen, numSteps} =
      this.answer;
    if (i < 0) {
      this.inspector.replaceChildren(make("span", {class: "hint"},
        "Point at a token, or press Tab and the arrow keys."));
      return;
    }
    const facts = [["id", ids[i]], ["position", positions[i]],
      ["line", i < promptLen ? "prompt" : lines[lineOf[i]].name]];
    if (i < promptLen) facts.push(["", "of the prompt"]);
    else if (forced[i]) facts.push(["", "written by the engine"]);
    else {
      const p = logp[i] === null ? "" : ` (${(100 * Math.exp(logp[i] / 100)).toFixed(1)}%)`;
      facts.push(["step", steps[i]],
        ["log-prob", logp[i] === null ? "none" : `${(logp[i] / 100).toFixed(2)}${p}`]);
    }
    this.inspector.replaceChildren(make("code", {dir: "auto"}, visible(JSON.stringify(pieces[i]))),
      ...facts.map(([name, value]) => 
        make("span", {}, ...(name ? [make("b", {}, name), " "] : []), `${value}`)));
    if (this.cursor) {
      this.cursor.hidden = steps[i] < 0;
      this.cursor.style.left = `${100 * (steps[i] + 0.5) / numSteps}%`;
    }
  }
}
