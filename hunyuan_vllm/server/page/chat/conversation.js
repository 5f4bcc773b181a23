/** What of a conversation is sent: questions that failed, or were stopped before an answer came, are not sent again. */

/** Whether the message at `index` is a question without an answer. */
export function isUnanswered(messages, index) {
  const [question, answer] = messages.slice(index, index + 2);
  return question.role === "user" && !(answer?.role === "assistant" && answer.content);
}

/** The messages to send, [{role, content}], of which the last is the question to answer. */
export function messagesToSend(messages) {
  const last = messages.findLastIndex(({ role }) => role === "user");
  const sent = messages.filter(({ content }, index) => content && (index === last || !isUnanswered(messages, index)));
  return sent.map(({ role, content }) => ({ role, content }));
}
