/** Saves the conversation as a file: Markdown, to read it or to paste it elsewhere. */
export function downloadConversation(messages, system) {
  const link = document.createElement("a");
  const time = new Date().toISOString().slice(0, 19).replaceAll(":", "-");
  link.href = URL.createObjectURL(new Blob([asMarkdown(messages, system)], { type: "text/markdown" }));
  link.download = `hunyuan-${time}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function asMarkdown(messages, system) {
  const turns = system ? [{ role: "system", content: system }, ...messages] : messages;
  return turns.map(({ role, content }) => `## ${role}\n\n${content}\n`).join("\n");
}
