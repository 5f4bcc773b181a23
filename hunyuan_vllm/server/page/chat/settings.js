/** The settings panel: system prompt, sampling, language, colours. */
import { publishedValues, Sampling } from "./sampling.js";
import { preferredLanguage, useLanguage } from "./words.js";

const panel = document.getElementById("settings");
const toggle = document.getElementById("show-settings");
const system = document.getElementById("system");
const language = document.getElementById("language");
const theme = document.getElementById("theme");

export class Settings {
  #sampling;

  /**
   * @param kept what `record` gave before
   * @param changed called after each change, with whether it was of the language
   */
  constructor(kept, changed) {
    this.#sampling = new Sampling(document.getElementById("sampling"), kept.sampling);
    system.value = kept.system ?? "";
    language.value = kept.language ?? preferredLanguage();
    theme.value = kept.theme ?? "auto";
    useLanguage(language.value);
    this.#colour();
    language.addEventListener("change", () => {
      useLanguage(language.value);
      changed(true);
    });
    theme.addEventListener("change", () => {
      this.#colour();
      changed(false);
    });
    panel.addEventListener("input", () => changed(false));
    panel.addEventListener("submit", (event) => event.preventDefault()); // Enter in a field
    document.getElementById("published").addEventListener("click", () => {
      this.#sampling.set(publishedValues());
      changed(false);
    });
    toggle.addEventListener("click", () => this.show(panel.hidden));
  }

  show(shown) {
    panel.hidden = !shown;
    toggle.ariaExpanded = String(shown);
    if (shown) system.focus();
  }

  /** Whether all can be sent; if not, the wrong field is shown. */
  check() {
    const wrong = this.#sampling.wrong;
    if (!wrong) return true;
    this.show(true);
    wrong.focus();
    wrong.reportValidity();
    return false;
  }

  get sampling() {
    return this.#sampling.values;
  }

  get system() {
    return system.value.trim();
  }

  /** To be kept. */
  get record() {
    return { sampling: this.sampling, system: system.value, language: language.value, theme: theme.value };
  }

  #colour() {
    document.documentElement.dataset.theme = theme.value;
  }
}
