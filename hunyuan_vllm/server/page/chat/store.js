/** What the browser keeps: the conversation and settings as one record, and the API key apart from them. */
const RECORD = "hunyuan.chat";
const KEY = "hunyuan.key";

export function loadRecord() {
  try {
    return JSON.parse(localStorage.getItem(RECORD)) ?? {};
  } catch {
    return {};
  }
}

/** False where the browser keeps nothing: storage is switched off or full. */
export function saveRecord(record) {
  try {
    localStorage.setItem(RECORD, JSON.stringify(record));
    return true;
  } catch {
    return false;
  }
}

/** Call back when another tab has changed the record. */
export function onChangeElsewhere(callback) {
  addEventListener("storage", (event) => event.key === RECORD && callback());
}

export function loadKey() {
  try {
    return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** Keep the key until the tab is closed, or for good. */
export function saveKey(key, forGood) {
  try {
    localStorage.removeItem(KEY);
    (forGood ? localStorage : sessionStorage).setItem(KEY, key);
    if (forGood) sessionStorage.removeItem(KEY);
  } catch {
    // kept by nobody: the page holds it until it is reloaded
  }
}
