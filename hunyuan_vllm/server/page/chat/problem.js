/** What went wrong with a request, as something the page has words for. */
export class Problem extends Error {
  /**
   * @param kind one of: key, unreachable, busy, tooLong, refused, server, cut
   * @param detail the server's own words, if it had any
   * @param retryAfter seconds to wait, where the server said
   */
  constructor(kind, detail = "", retryAfter = null) {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
    this.retryAfter = retryAfter;
  }
}

/** The problem behind an answer that is no success. */
export async function problemOf(response) {
  const detail = messageIn(await response.text());
  return new Problem(kindOf(response.status, detail), detail, response.headers.get("Retry-After"));
}

/** The problem behind an error that the server reports in the middle of a stream. */
export function problemInStream(error) {
  return new Problem(kindOf(error.code ?? 500, error.message), error.message);
}

function kindOf(status, detail) {
  if (status === 401 || status === 403) return "key";
  if (status === 429 || status === 503) return "busy";
  if (status === 413 || /context length|too long|too large/i.test(detail)) return "tooLong";
  return status < 500 ? "refused" : "server";
}

function messageIn(text) {
  try {
    const content = JSON.parse(text);
    return String(content.error?.message ?? content.detail ?? "");
  } catch {
    return "";
  }
}
