/** The page's end, where an answer grows. */
const NEAR = 120; // pixels

/** Run `change`, and stay at the end if that is where the reader is. */
export function following(change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR;
  change();
  if (atEnd) goToEnd();
}

export function goToEnd() {
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
}
