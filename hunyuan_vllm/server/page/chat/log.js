/** The conversation on the page, with buttons at its last turns. */
import { isUnanswered } from "./conversation.js";
import { Turn } from "./turn.js";

export class Log {
  #turns = [];

  /**
   * @param place the element that holds the turns
   * @param actions {again, edit, remove}: what the buttons of the last turns, and of unanswered questions, do
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
    const { again, edit, remove } = this.actions;
    const messages = this.#turns.map(({ message }) => message);
    const lastQuestion = messages.findLastIndex(({ role }) => role === "user");
    for (const [index, turn] of this.#turns.entries()) {
      turn.unanswered = isUnanswered(messages, index);
      turn.offer({
        ...(index === lastQuestion && { edit }),
        ...(turn.unanswered && { remove: () => remove(turn.message) }),
        ...(index > lastQuestion && index === messages.length - 1 && { again }),
      });
    }
  }
}
