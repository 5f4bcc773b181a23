/** The first meeting with the server: it can be asked once its models are known, with a key where it wants one. */
import { askForKey, currentKey } from "./keydialog.js";
import { chosenModel, loadModels } from "./models.js";
import { Problem } from "./problem.js";

let opening = null; // promise, while they meet: a key is asked for once, whoever waits

/** Until the server can be asked. Throws a Problem if it cannot. */
export function ready() {
  opening ??= meet().finally(() => (opening = null));
  return opening;
}

/** Have the user enter a key. Throws a Problem if it cannot be tried. */
export async function changeKey() {
  await askForKey(accepts);
}

async function meet() {
  if (chosenModel() || (await accepts(currentKey()))) return;
  if (!(await askForKey(accepts))) throw new Problem("key");
}

async function accepts(key) {
  try {
    await loadModels(key);
    return true;
  } catch (error) {
    if (error.kind === "key") return false;
    throw error;
  }
}
