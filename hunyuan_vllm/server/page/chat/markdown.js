/**
 * Markdown of a model, which nobody may trust, as HTML that cannot run anything.
 *
 * Three fences: HTML in the text stays text, what Markdown makes of it passes an allow-list, and the page's
 * Content-Security-Policy forbids inline scripts and styles and every other origin.
 */
import { keepFormulas } from "./math.js";
import hljs from "./vendor/highlight.js";
import MarkdownIt from "./vendor/markdown-it.js";
import DOMPurify from "./vendor/purify.js";

const MOST_HIGHLIGHTED = 50_000; // characters of a code block
const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr h1 h2 h3 h4 h5 h6 em strong s a code pre span blockquote ul ol li".split(" "),
    ..."table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "class", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new MarkdownIt({ html: false, linkify: true, highlight });
markdown.disable("image"); // fetching one would tell its server who reads what
keepFormulas(markdown);
markdown.core.ruler.push("below the page's headings", lowerHeadings);
for (const rule of ["th_open", "td_open"]) markdown.renderer.rules[rule] = alignByClass;

/** The HTML of each top-level block (paragraph, list, table, code …), not yet safe. */
export function blocksOf(text) {
  const environment = {};
  const blocks = [];
  let block = [];
  for (const token of markdown.parse(text, environment)) {
    block.push(token);
    if (token.level === 0 && token.nesting <= 0) {
      blocks.push(markdown.renderer.render(block, markdown.options, environment));
      block = [];
    }
  }
  return blocks;
}

/** Safe elements for a block's HTML. */
export function elementsOf(html) {
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href; // the text may say something else
  }
  return fragment;
}

function highlight(code, language) {
  if (!hljs.getLanguage(language) || code.length > MOST_HIGHLIGHTED) return ""; // markdown-it escapes it
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

/** The page's own headings are h1 and h2. */
function lowerHeadings(state) {
  for (const token of state.tokens) {
    if (token.type.startsWith("heading_")) token.tag = `h${Math.min(6, Number(token.tag[1]) + 2)}`;
  }
}

function alignByClass(tokens, index, options, environment, renderer) {
  const token = tokens[index];
  const style = token.attrGet("style"); // "text-align:right"; the policy allows no inline styles
  if (style) token.attrs = [["class", style.replace("text-align:", "align-")]];
  return renderer.renderToken(tokens, index, options);
}
