/** Shows Markdown that grows: only blocks that changed are made anew, so that a selection in the others survives. */
import { copyButton } from "./copy.js";
import { blocksOf, elementsOf } from "./markdown.js";

const shown = new WeakMap(); // element → its blocks' HTML, one child an entry

export function showMarkdown(element, text) {
  const before = shown.get(element) ?? [];
  const blocks = blocksOf(text);
  let same = 0;
  while (same < blocks.length && blocks[same] === before[same]) same += 1;
  while (element.children.length > same) element.lastElementChild.remove();
  for (const html of blocks.slice(same)) element.append(blockElement(html));
  shown.set(element, blocks);
}

function blockElement(html) {
  const block = document.createElement("div");
  block.className = "block";
  block.append(elementsOf(html));
  for (const code of block.querySelectorAll("pre")) makeCodeUsable(code);
  for (const table of block.querySelectorAll("table")) makeScrollable(table);
  return block;
}

/** Wide code can be scrolled by keyboard, and taken along with a button. */
function makeCodeUsable(code) {
  const frame = document.createElement("div");
  frame.className = "code";
  code.tabIndex = 0;
  code.replaceWith(frame);
  frame.append(copyButton("copyCode", () => code.textContent), code);
}

function makeScrollable(table) {
  const frame = document.createElement("div");
  frame.className = "wide";
  frame.tabIndex = 0;
  table.replaceWith(frame);
  frame.append(table);
}
