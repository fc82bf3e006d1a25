// The page of folders and files: what is indexed, what could not be read, and changes of both.

import { ApiError, forgetFolder, getFailures, getFolders, getGallery, problemText, startIndexing } from "./api.js";
import { byId, showPath } from "./dom.js";
import { IndexingMonitor, resultText, showProgress } from "./indexing.js";
import { displayName, displayPath } from "./paths.js";

/** @typedef {import("./api.js").FileFailure} FileFailure */
/** @typedef {import("./api.js").IndexedFolder} IndexedFolder */
/** @typedef {import("./api.js").Indexing} Indexing */

const RETRY_MS = 1500;
/** As many as `sbtk index --regions` keeps. */
const REGIONS = "16";

const indexing = new IndexingMonitor();
const confirmation = byId("confirm", HTMLDialogElement);
const failureList = byId("failures", HTMLUListElement);
/** @type {IndexedFolder | null} */
let removed = null;
let jobs = -1;
/** @type {number | undefined} */
let retryTimer;

indexing.addEventListener("change", showIndexing);
byId("update", HTMLButtonElement).addEventListener("click", () => void change(() => startIndexing()));
byId("compare-parts", HTMLButtonElement).addEventListener("click", () => void change(() => startIndexing({ regions: REGIONS })));
byId("add", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  const field = byId("path", HTMLInputElement);
  void change(() => startIndexing({ under: field.value.trim() })).then((isStarted) => {
    if (isStarted) field.value = "";
  });
});
byId("more-failures", HTMLButtonElement).addEventListener("click", () => void showFailures(failureList.children.length));
confirmation.addEventListener("close", () => {
  const path = removed?.path;
  removed = null;
  if (confirmation.returnValue === "remove" && path != null) void change(() => forgetFolder(path));
});
// Otherwise browsers would leave the page for what is dropped on it.
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer?.files ?? [];
  if (file === undefined) return;
  event.preventDefault();
  const name = displayName({ path: file.name });
  const canAdd = !byId("add", HTMLElement).hidden;
  const next = canAdd ? 'Type the full path of the folder under "Add a folder".' : "Add the folder on the computer that runs sbtk.";
  showStatus(`Browsers do not tell where ${name} is. ${next}`, true);
  byId("path", HTMLInputElement).focus();
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") void load();
});
void load();

/** Shows folders and failures, and follows the progress. */
async function load() {
  clearTimeout(retryTimer);
  try {
    const [{ folders, can_change: canChange }] = await Promise.all([getFolders(), showFailures(0)]);
    byId("folders", HTMLUListElement).replaceChildren(...folders.map((folder) => folderItem(folder, canChange)));
    byId("add", HTMLElement).hidden = !canChange;
    byId("update", HTMLElement).hidden = !canChange || folders.length === 0;
    byId("read-only", HTMLElement).hidden = canChange;
    if (indexing.state === null) showStatus("");
    indexing.watch();
    await showParts(canChange && folders.length > 0);
  } catch (error) {
    showError(error);
    retryTimer = setTimeout(() => void load(), RETRY_MS);
  }
}

/**
 * Shows whether parts of photos are compared, and offers it.
 * @param {boolean} canChange
 */
async function showParts(canChange) {
  const { regions, bits } = await getGallery();
  const isCompared = regions !== null;
  byId("parts", HTMLElement).hidden = !isCompared && (!canChange || bits !== null);
  byId("parts-offer", HTMLElement).hidden = isCompared;
  byId("parts-compared", HTMLElement).hidden = !isCompared;
}

/**
 * @param {() => Promise<Indexing>} request
 * @returns {Promise<boolean>} whether the server accepted it
 */
async function change(request) {
  try {
    await request();
    indexing.watchAnew();
    return true;
  } catch (error) {
    showError(error);
    return false;
  }
}

function showIndexing() {
  showProgress(indexing);
  const { state, isBusy, isConnected } = indexing;
  if (state === null || !isConnected) return;
  if (isBusy) {
    showStatus("");
    return;
  }
  const count = state.photos == null ? "" : `${state.photos.toLocaleString("en")} photos searchable`;
  showStatus(resultText(indexing) || count, state.problem != null || indexing.isInterrupted);
  const { warnings = [], notices = [], left_out: leftOut = [] } = state.report ?? {};
  const remarks = [...warnings, ...notices, ...leftOut];
  byId("remarks", HTMLElement).hidden = remarks.length === 0;
  const items = remarks.map((text) => textItem("", text.charAt(0).toUpperCase() + text.slice(1)));
  byId("remarks-list", HTMLUListElement).replaceChildren(...items);
  if (jobs >= 0 && jobs !== state.jobs) void load();
  jobs = state.jobs;
}

/**
 * @param {IndexedFolder} folder
 * @param {boolean} canChange
 * @returns {HTMLLIElement}
 */
function folderItem(folder, canChange) {
  const template = byId("folder", HTMLTemplateElement);
  const item = /** @type {HTMLLIElement} */ (document.importNode(template.content, true).firstElementChild);
  const name = displayPath(folder);
  const counts = [`${folder.photos.toLocaleString("en")} ${folder.photos === 1 ? "photo" : "photos"}`];
  if (folder.missing > 0) counts.push(`${folder.missing.toLocaleString("en")} missing`);
  if (!folder.exists) counts.push("not found: is a drive unplugged?");
  item.classList.toggle("is-missing", !folder.exists);
  const title = item.querySelector(".collection-name");
  if (title instanceof HTMLElement) showPath(title, name);
  setText(item, ".collection-count", counts.join(" · "));
  for (const button of item.querySelectorAll("button")) {
    // A name that is not UTF-8 cannot be sent.
    button.hidden = !canChange || folder.path == null;
    button.setAttribute("aria-label", `${button.textContent} ${name}`);
    button.addEventListener("click", () => {
      if (button.dataset.action === "update") void change(() => startIndexing({ under: folder.path ?? "" }));
      else askToRemove(folder);
    });
  }
  return item;
}

/** @param {IndexedFolder} folder */
function askToRemove(folder) {
  removed = folder;
  showPath(byId("confirm-path", HTMLElement), displayPath(folder));
  confirmation.returnValue = "";
  confirmation.showModal();
}

/** @param {number} offset the number of failures that are shown */
async function showFailures(offset) {
  const { failures, count } = await getFailures(offset);
  const items = failures.map((failure) =>
    textItem(displayPath(failure), failure.is_searchable ? `${failure.reason} (the rest is searchable)` : failure.reason),
  );
  if (offset === 0) failureList.replaceChildren(...items);
  else failureList.append(...items);
  byId("no-failures", HTMLElement).hidden = count > 0;
  byId("more-failures", HTMLElement).hidden = failureList.children.length >= count;
  byId("failures-title", HTMLElement).textContent =
    count === 0 ? "Files that could not be read" : `Files that could not be read (${count.toLocaleString("en")})`;
}

/**
 * @param {string} name
 * @param {string} detail
 * @returns {HTMLLIElement}
 */
function textItem(name, detail) {
  const item = document.createElement("li");
  const box = document.createElement("div");
  const [title, text] = [document.createElement("span"), document.createElement("span")];
  title.className = "collection-name";
  showPath(title, name);
  text.className = "collection-count";
  text.textContent = detail;
  box.append(title, text);
  item.append(box);
  return item;
}

/**
 * @param {Element} parent
 * @param {string} selector
 * @param {string} text
 */
function setText(parent, selector, text) {
  const element = parent.querySelector(selector);
  if (element !== null) element.textContent = text;
}

/** @param {unknown} error */
function showError(error) {
  if (error instanceof ApiError) showStatus(problemText(error), true);
  else throw error;
}

/**
 * @param {string} text
 * @param {boolean} [isError]
 */
function showStatus(text, isError = false) {
  const status = byId("status", HTMLElement);
  status.textContent = text;
  status.classList.toggle("is-error", isError);
}
