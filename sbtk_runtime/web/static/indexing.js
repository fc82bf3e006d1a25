// The progress of indexing, from server-sent events.

import { ApiError, getIndexing, problemText } from "./api.js";
import { byId } from "./dom.js";

/** @typedef {import("./api.js").Indexing} Indexing */

const RETRY_MS = 1500;

/** Follows the server while it indexes. Dispatches "change" with every event, and when the connection is lost. */
export class IndexingMonitor extends EventTarget {
  /** @type {Indexing | null} the last known state */
  state = null;
  isConnected = true;
  /** Whether the server was stopped before it had finished. */
  isInterrupted = false;
  /** @type {EventSource | null} */
  #source = null;
  /** Whether it follows the server, when the page is visible. */
  #isWatching = false;
  /** @type {number | undefined} */
  #timer;

  constructor() {
    super();
    // A connection that was open while the computer slept may be dead without an error.
    const renew = () => {
      if (this.#isWatching) this.#connect();
    };
    document.addEventListener("visibilitychange", renew);
    window.addEventListener("online", renew);
  }

  /** Follows the progress until the server has nothing to do. */
  watch() {
    if (!this.#isWatching) this.#connect();
  }

  /** Follows what the server has accepted just now: an open connection may still deliver that it has nothing to do. */
  watchAnew() {
    this.#connect();
  }

  get isBusy() {
    return this.state !== null && this.state.phase !== "idle";
  }

  #connect() {
    this.#stop();
    this.#isWatching = true;
    // All windows share the few connections that browsers keep to a server: hidden ones leave them to others.
    if (document.visibilityState === "hidden") return;
    const source = (this.#source = new EventSource("v1/indexing/events"));
    source.addEventListener("indexing", (event) => {
      const before = this.state;
      const state = (this.state = /** @type {Indexing} */ (JSON.parse(event.data)));
      // The number of jobs starts at 0 again with the server.
      this.isInterrupted = !this.isBusy && before !== null && before.phase !== "idle" && state.jobs <= before.jobs;
      this.isConnected = true;
      if (!this.isBusy) this.#stop();
      this.dispatchEvent(new Event("change"));
    });
    source.addEventListener("error", () => {
      // Browsers reconnect to servers that do not respond, but not to those that refuse, for example while they stop.
      this.#stop();
      this.#retrySoon();
      this.isConnected = false;
      this.dispatchEvent(new Event("change"));
    });
  }

  #retrySoon() {
    this.#timer = setTimeout(async () => {
      try {
        await getIndexing();
        this.watch();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        this.#retrySoon();
      }
    }, RETRY_MS);
  }

  #stop() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
    this.#isWatching = false;
  }
}

/**
 * Shows the progress while the server indexes, and hides it afterwards.
 * @param {IndexingMonitor} monitor
 */
export function showProgress({ state, isBusy, isConnected }) {
  byId("indexing", HTMLElement).hidden = !isBusy;
  if (state === null || !isBusy) return;
  const text = isConnected ? progressText(state) : `${progressText({ ...state, rate: 0 })} · reconnecting to the server`;
  byId("indexing-text", HTMLElement).textContent = text;
  const bar = byId("indexing-bar", HTMLProgressElement);
  if (state.total == null) bar.removeAttribute("value");
  else [bar.max, bar.value] = [state.total, state.done];
}

/**
 * Returns the progress as a sentence.
 * @param {Indexing} state
 * @returns {string}
 */
function progressText({ phase, done, total, rate }) {
  if (phase === "forgetting") return "Removing a folder";
  if (phase === "finding" || total == null) return done > 0 ? `Looking for photos: ${count(done)} files so far` : "Looking for photos";
  const left = rate > 0 ? (total - done) / rate : 0;
  const parts = [`Indexing ${count(done)} of ${count(total)} photos`];
  if (rate >= 1) parts.push(`${count(Math.round(rate))} per second`);
  if (left >= 60) parts.push(`${count(Math.ceil(left / 60))} min left`);
  return parts.join(" · ");
}

/**
 * Returns the result of the last update as a sentence; "" if there was none.
 * @param {IndexingMonitor} monitor
 * @returns {string}
 */
export function resultText({ state, isInterrupted }) {
  if (isInterrupted) return "The server was stopped before all photos were indexed. Update the folders to go on.";
  if (state === null) return "";
  const { report, problem } = state;
  if (problem) return problemText(problem);
  if (!report) return "";
  const counts = Object.entries({
    new: report.new,
    changed: report.changed,
    moved: report.moved,
    "found again": report.found_again,
    missing: report.missing,
    unreadable: report.unreadable,
  }).filter(([, number]) => number > 0);
  const changes = counts.map(([name, number]) => `${count(number)} ${name}`).join(", ");
  return `${count(report.photos)} photos searchable: ${changes || "nothing new"}`;
}

/** @param {number} number */
function count(number) {
  return number.toLocaleString("en");
}
