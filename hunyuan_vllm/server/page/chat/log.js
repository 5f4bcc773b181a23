/** The conversation on the page, with buttons at its last turns. */
import { Turn } from "./turn.js";

export class Log {
  #turns = [];

  /**
   * @param place the element that holds the turns
   * @param actions {again, edit}: what the buttons of the last turns do
   */
  constructor(place, actions) {
    this.place = place;
    this.actions = actions;
  }

  /** Show these messages and no others. */
  show(messages) {
    this.#turns = [];
    this.place.replaceChildren();
    for (const message of messages) this.add(message);
  }

  add(message) {
    const turn = new Turn(message);
    this.#turns.push(turn);
    this.place.append(turn.element);
    return turn;
  }

  /** Offer what can be done now. */
  offer() {
    const lastQuestion = this.#turns.findLast((turn) => turn.message.role === "user");
    for (const turn of this.#turns) {
      const { again, edit } = this.actions;
      const isLast = turn === this.#turns.at(-1);
      turn.offer(turn === lastQuestion ? { edit } : isLast ? { again } : {});
    }
  }
}
