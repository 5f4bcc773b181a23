/** The sampling controls: their ranges, and the values published with Hunyuan-Large (its generation_config.json). */
import { translate } from "./words.js";

const CONTROLS = [
  { name: "temperature", published: 0.7, min: 0, max: 2, step: 0.01 },
  { name: "top_p", published: 0.6, min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", published: 20, min: 0, max: 1_000_000, step: 1 },
  { name: "repetition_penalty", published: 1.05, min: 0.01, max: 2, step: 0.01 },
  { name: "max_tokens", published: null, min: 1, max: 1_000_000, step: 1 },
  { name: "seed", published: null, min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];

export class Sampling {
  #inputs = new Map();

  /** @param values by name, as `values` gives them; published ones where there are none */
  constructor(place, values) {
    for (const control of CONTROLS) place.append(...this.#elements(control));
    this.set(values ?? publishedValues());
    translate(place);
  }

  set(values) {
    for (const [name, input] of this.#inputs) input.value = values[name] ?? "";
  }

  /** What to send; nothing for an empty field. */
  get values() {
    const filled = [...this.#inputs].filter(([, input]) => input.value !== "");
    return Object.fromEntries(filled.map(([name, input]) => [name, input.valueAsNumber]));
  }

  /** The first field with a value that cannot be sent; undefined if all can. */
  get wrong() {
    return [...this.#inputs.values()].find((input) => !input.validity.valid);
  }

  #elements({ name, published, min, max, step }) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const hint = document.createElement("p");
    label.htmlFor = name;
    label.dataset.text = name;
    Object.assign(input, { id: name, type: "number", min, max, step, required: published !== null });
    input.setAttribute("aria-describedby", `${name}-hint`);
    Object.assign(hint, { id: `${name}-hint`, className: "note" });
    hint.dataset.text = `${name}Hint`;
    this.#inputs.set(name, input);
    return [label, input, hint];
  }
}

export function publishedValues() {
  return Object.fromEntries(CONTROLS.map(({ name, published }) => [name, published]));
}
