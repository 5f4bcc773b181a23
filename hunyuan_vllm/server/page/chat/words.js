/** The page's words in the chosen language. */
import { en } from "./words.en.js";
import { zh } from "./words.zh.js";

const LANGUAGES = { en, zh };
let language = "en";

/** The language a new visitor gets. */
export function preferredLanguage() {
  return navigator.languages.find((tag) => /^(en|zh)\b/.test(tag))?.slice(0, 2) ?? "en";
}

export function useLanguage(chosen) {
  language = chosen in LANGUAGES ? chosen : "en";
  document.documentElement.lang = language;
  translate(document.body);
}

/** The words for `name`, with {values} filled in. */
export function say(name, values = {}) {
  return LANGUAGES[language][name].replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits }).format(value);
}

/** Fill in the words of elements that name them: data-text, data-label, data-placeholder. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) element.ariaLabel = say(element.dataset.label);
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = say(element.dataset.placeholder);
}
