/**
 * LaTeX in an answer is shown as it was written. Markdown would take away its backslashes, and make lists and emphasis
 * of its signs.
 */
const MOST = 4000; // characters of a formula; a longer one is Markdown
const INLINE = new RegExp(
  [
    `\\\\\\([^]{1,${MOST}}?\\\\\\)`, // \( … \)
    `\\\\\\[[^]{1,${MOST}}?\\\\\\]`, // \[ … \]
    `\\$\\$[^]{1,${MOST}}?\\$\\$`, // $$ … $$
    `\\$(?!\\s)(?:[^$\\\\]|\\\\.){1,${MOST}}?(?<!\\s)\\$(?!\\d)`, // $ … $, but no two prices
  ].join("|"),
  "y",
);
const CLOSING = { "\\[": "\\]", $$: "$$" };

/** Have `markdown` (a MarkdownIt) make elements of class "math" of formulas. */
export function keepFormulas(markdown) {
  const { escapeHtml } = markdown.utils;
  markdown.inline.ruler.before("escape", "formula", readInline);
  const interrupts = ["paragraph", "reference", "blockquote", "list"];
  markdown.block.ruler.before("blockquote", "formula_block", readBlock, { alt: interrupts });
  markdown.renderer.rules.formula = (tokens, at) => `<span class="math">${escapeHtml(tokens[at].content)}</span>`;
  markdown.renderer.rules.formula_block = (tokens, at) => `<p class="math">${escapeHtml(tokens[at].content)}</p>\n`;
}

function readInline(state, silent) {
  INLINE.lastIndex = state.pos;
  const [formula] = INLINE.exec(state.src) ?? [];
  if (!formula || state.pos + formula.length > state.posMax) return false;
  if (!silent) state.push("formula", "", 0).content = formula;
  state.pos += formula.length;
  return true;
}

/** Lines from one that begins with \[ or $$ to one that ends with its counterpart. */
function readBlock(state, first, end, silent) {
  const start = state.bMarks[first] + state.tShift[first];
  const closing = CLOSING[state.src.slice(start, start + 2)];
  const close = closing ? state.src.indexOf(closing, start + 2) : -1;
  if (close < 0) return false;
  let last = first;
  while (last < end && state.eMarks[last] < close) last += 1;
  if (last === end || state.src.slice(close + 2, state.eMarks[last]).trim()) return false;
  if (silent) return true;
  state.push("formula_block", "", 0).content = state.getLines(first, last + 1, state.blkIndent, false).trim();
  state.line = last + 1;
  return true;
}
