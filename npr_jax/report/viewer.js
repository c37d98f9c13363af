// The viewer: the list of answers with its filters, and the one that is open.

const ROW = 58;  // pixels; the list draws the rows in sight only
const KEYS = [["j, k", "next and previous answer"], ["/", "search"], ["Tab", "go on to the next part"],
  ["↑ ↓, Enter", "in the list: choose an answer, open it"],
  ["← →", "in tree and timeline: token by token"],
  ["↑ ↓", "in tree and timeline: to the line before and after, at the same step"],
  ["Home, End", "first and last of the list or line"], ["Esc", "back to the list"],
  ["?", "this help"]];

class Viewer {
  constructor(place, rows) {
    this.rows = rows;
    this.texts = rows.map((row) =>
      [row.id, row.group, row.prediction, row.problem].join("\n").toLowerCase());
    this.chosen = rows.map((_, i) => i);
    this.cursor = 0;  // in `chosen`
    this.open = -1;  // in `rows`
    this.opening = 0;
    const groups = [...new Set(rows.map((row) => row.group))];
    this.group = this.select("Answers of", [["", "all"], ...groups.map((g) => [g, visible(g)])]);
    this.kind = this.select("Which", [["", "all answers"], ["right", "right"], ["wrong", "wrong"],
      ["none", "not judged"], ["broken", "format broken"], ["parallel", "parallel"]]);
    this.search = make("input", {type: "search", placeholder: "Search problem, id, answer  /",
      "aria-label": "Search in problems, ids and answers"});
    this.count = make("p", {class: "count", role: "status"});
    this.sizer = make("div", {class: "sizer", role: "presentation"});
    this.list = make("div", {class: "list", role: "listbox", tabindex: "0",
      "aria-label": "Answers"}, this.sizer);
    this.help = this.makeHelp();
    this.detail = make("article", {class: "detail", "aria-label": "The open answer"});
    const help = make("button", {type: "button", class: "keys"}, "Keys ?");
    help.addEventListener("click", () => this.help.showModal());
    place.append(make("div", {class: "side"},
      make("div", {class: "filters"}, this.search, this.group, this.kind,
        make("div", {class: "bar"}, this.count, help)), this.list), this.detail, this.help);
    this.search.addEventListener("input", () => this.filter());
    this.group.addEventListener("change", () => this.filter());
    this.kind.addEventListener("change", () => this.filter());
    this.list.addEventListener("scroll", () => this.draw());
    this.list.addEventListener("keydown", (event) => this.listKey(event));
    this.list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.show(option.place);
    });
    document.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.list);
    this.filter();
    const asked = /^#answer-(\d+)$/.exec(location.hash);
    const first = asked ? this.chosen.indexOf(Number(asked[1])) : 0;
    this.show(Math.max(first, 0), Boolean(asked));
  }

  select(label, options) {
    return make("select", {"aria-label": label},
      ...options.map(([value, text]) => make("option", {value}, text)));
  }

  makeHelp() {
    const close = make("button", {type: "submit"}, "Close");
    return make("dialog", {class: "help", "aria-label": "Keys"},
      make("form", {method: "dialog"}, make("h3", {}, "Keys"), make("dl", {},
        ...KEYS.map(([keys, text]) => make("div", {}, make("dt", {}, keys), make("dd", {}, text)))),
      close));
  }

  filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const tests = {right: (r) => r.correct === true, wrong: (r) => r.correct === false,
      none: (r) => r.correct === null, broken: (r) => r.broken > 0, parallel: (r) => r.width > 1};
    const test = tests[this.kind.value] || (() => true);
    const group = this.group.value;
    this.chosen = [];
    this.rows.forEach((row, i) => {
      if ((!group || row.group === group) && test(row)
        && words.every((word) => this.texts[i].includes(word))) this.chosen.push(i);
    });
    const all = this.rows.length.toLocaleString("en");
    this.count.textContent = this.chosen.length === this.rows.length ? `${all} answers`
      : `${this.chosen.length.toLocaleString("en")} of ${all}`;
    this.sizer.style.height = `${ROW * this.chosen.length}px`;
    this.cursor = Math.max(0, this.chosen.indexOf(this.open));
    this.list.scrollTop = 0;
    this.reveal();
  }

  // Draws the rows in sight.
  draw() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 3);
    const last = Math.min(this.chosen.length,
      Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 3);
    const drawn = [];
    for (let place = first; place < last; place++) drawn.push(this.option(place));
    this.sizer.replaceChildren(...drawn);
    if (this.chosen.length) this.list.setAttribute("aria-activedescendant", `option-${this.cursor}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  option(place) {
    const i = this.chosen[place], row = this.rows[i];
    const [kind, mark, word] = row.correct === null ? ["none", "–", "not judged"]
      : row.correct ? ["right", "✓", "right"] : ["wrong", "✗", "wrong"];
    const figures = `${row.tokens.toLocaleString("en")} tokens`
      + (row.width > 1 ? ` · ${row.width} wide` : "") + (row.broken ? " · format broken" : "");
    const made = make("div", {id: `option-${place}`, role: "option",
      "aria-selected": i === this.open, "aria-setsize": this.chosen.length,
      "aria-posinset": place + 1, class: place === this.cursor ? "option at" : "option"},
      make("span", {class: `mark ${kind}`, role: "img", "aria-label": word}, mark),
      make("span", {class: "what"}, make("b", {}, visible(row.id || row.group)),
        make("small", {}, ` #${row.sample}`), make("span", {class: "figure"}, figures)),
      make("span", {class: "snippet", dir: "auto"}, visible(row.problem)));
    made.style.top = `${ROW * place}px`;
    made.place = place;
    return made;
  }

  // Brings the cursor of the list into sight.
  reveal() {
    const top = ROW * this.cursor, height = this.list.clientHeight;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + height) this.list.scrollTop = top + ROW - height;
    this.draw();
  }

  // Opens the answer at a place of the list.
  async show(place, scroll = false) {
    if (!this.chosen.length) return;
    this.cursor = Math.min(Math.max(place, 0), this.chosen.length - 1);
    const i = this.open = this.chosen[this.cursor], opening = ++this.opening;
    this.reveal();
    try {
      const answer = await unpack(document.getElementById(`answer-${i}`).textContent);
      if (opening !== this.opening) return;  // another one was opened since
      this.view = new AnswerView(this.detail, this.rows[i], answer);
    } catch (error) {
      if (opening !== this.opening) return;
      this.detail.replaceChildren(make("p", {role: "alert"},
        `This answer cannot be shown: ${error}`));
    }
    this.detail.dataset.open = i;
    if (scroll) this.detail.scrollIntoView({block: "start"});
  }

  move(place) {
    this.cursor = Math.min(Math.max(place, 0), this.chosen.length - 1);
    this.reveal();
  }

  listKey(event) {
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const to = {ArrowDown: this.cursor + 1, ArrowUp: this.cursor - 1, Home: 0,
      End: this.chosen.length - 1, PageDown: this.cursor + page, PageUp: this.cursor - page};
    if (event.key in to) this.move(to[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.show(this.cursor, this.stacked());
    else return;
    event.preventDefault();
  }

  // Whether the window is so narrow that the open answer stands below the list.
  stacked() {
    return this.detail.getBoundingClientRect().top > this.list.getBoundingClientRect().top + 100;
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || this.help.open) return;
    if (event.key === "Escape") {
      this.list.focus();
      this.list.scrollIntoView({block: "nearest"});
    }
    if (event.target.closest("input, select, textarea")) return;
    if (event.key === "j" || event.key === "k") {
      this.show(this.cursor + (event.key === "j" ? 1 : -1), this.stacked());
    } else if (event.key === "/") {
      this.search.focus();
      this.search.select();
    } else if (event.key === "?") this.help.showModal();
    else return;
    event.preventDefault();
  }
}

window.viewer = new Viewer(document.getElementById("viewer"),
  JSON.parse(document.getElementById("rows").textContent));
