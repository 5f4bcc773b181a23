/** The models the server offers, and which of them is asked. */
import { listModels } from "./api.js";

const select = document.getElementById("model");
let models = [];
let preferred = "";

/** The one to ask if the server has it. */
export function preferModel(id) {
  preferred = id;
}

/** Ask the server which there are. Adapters are models of their own; other names of one model are left out. */
export async function loadModels(key) {
  models = (await listModels(key)).filter(isFirstOfItsNames);
  const chosen = select.value || preferred;
  select.replaceChildren(...models.map(({ id }) => new Option(id)));
  if (models.some(({ id }) => id === chosen)) select.value = chosen;
}

export function forgetModels() {
  models = [];
}

/** {id, max_model_len} of the one to ask; undefined while none is known. */
export function chosenModel() {
  return models.find(({ id }) => id === select.value);
}

function isFirstOfItsNames(model, index, all) {
  return model.parent !== null || index === all.findIndex(({ parent, root }) => parent === null && root === model.root);
}
