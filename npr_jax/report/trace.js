// A trace as the page keeps it: unpacked, with its lines and the probabilities of its tokens.
"use strict";

const LEVELS = [[0.9, "90% and more"], [0.5, "50 to 90%"], [0.2, "20 to 50%"], [0.05, "5 to 20%"],
  [0, "less than 5%"]];
const ACCENTS = 6;

// What a browser would act on or not show; the same set as in lines.py.
const HIDDEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function visible(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    const hex = code.toString(16).toUpperCase().padStart(4, "0");
    return code === 0x7f ? "\u2421" : `\u27e8U+${hex}\u27e9`;
  });
}

// A new element. Text is text: nothing of it is ever read as HTML.
function make(tag, attributes, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const answer = await new Response(stream).json();
  const size = answer.ids.length;
  let sum = 0;
  answer.steps = answer.steps.map((change, i) => (sum += change) + i);
  const flags = new Uint8Array(size);
  for (const [start, end] of answer.forced) flags.fill(1, start, end);
  answer.forced = flags;
  const positions = new Int32Array(size);
  answer.positions.forEach(([begin, position], k) => {
    const end = k + 1 < answer.positions.length ? answer.positions[k + 1][0] : size;
    for (let i = begin; i < end; i++) positions[i] = position + i - begin;
  });
  answer.positions = positions;
  answer.numSteps = answer.steps.reduce((most, step) => Math.max(most, step + 1), 0);
  answer.lines = [];
  answer.lineOf = new Int32Array(size);
  answer.tree = readLine(answer, [answer.promptLen, size], 0, "trunk", 0);
  return answer;
}

// A line with its runs of own tokens, and the lines of the branches after each of them.
function readLine(answer, [start, end], depth, name, accent, score) {
  const line = {number: answer.lines.length, name, accent, depth, start, end, score, parts: []};
  answer.lines.push(line);
  const run = (from, to) => answer.lineOf.fill(line.number, from, to);
  let blocks = 0;
  for (const block of answer.blocks) {
    if (block.depth !== depth || block.start < start || block.start >= end) continue;
    blocks += 1;
    run(start, block.fork);
    const path = name === "trunk" ? "" : `${name} › `;
    line.parts.push({run: [start, block.fork], joined: block.join < answer.ids.length,
      block: blocks, branches: block.branches.map((span, i) =>
        readLine(answer, span, depth + 1, `${path}${blocks}.${i + 1}`, 1 + i % ACCENTS,
          block.scores?.[i]))});
    start = block.join;
  }
  run(start, end);
  line.parts.push({run: [start, end], branches: []});
  return line;
}

function level(logp) {
  const p = logp === null ? 0 : Math.exp(logp / 100);
  return LEVELS.findIndex(([least]) => p >= least);
}
