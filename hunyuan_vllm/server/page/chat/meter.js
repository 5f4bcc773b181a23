/** How fast an answer comes: time to the first token, then tokens a second. */
const MEASURABLE = 50; // milliseconds; tokens that come within less were held up on the way and say nothing

export class Meter {
  #asked = performance.now();
  #first = null;
  #last = null;

  /** @param tokens how many of the answer have come by now */
  note(tokens) {
    const reading = { time: performance.now(), tokens };
    this.#first ??= reading;
    this.#last = reading;
  }

  /** Seconds until the first token came; null before. */
  get wait() {
    return this.#first && (this.#first.time - this.#asked) / 1000;
  }

  /** Tokens a second after the first; null while there is nothing to measure. */
  get rate() {
    const time = this.#last ? this.#last.time - this.#first.time : 0;
    return time < MEASURABLE ? null : ((this.#last.tokens - this.#first.tokens) * 1000) / time;
  }
}
