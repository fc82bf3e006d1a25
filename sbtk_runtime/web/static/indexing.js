// The progress of indexing, from server-sent events.

/** @typedef {import("./api.js").Indexing} Indexing */

/** Follows the server while it indexes. Dispatches "change" with every event. */
export class IndexingMonitor extends EventTarget {
  /** @type {Indexing | null} */
  state = null;
  /** @type {EventSource | null} */
  #source = null;

  /** Follows the progress until the server has nothing to do: browsers keep few connections to a server. */
  watch() {
    if (this.#source !== null) return;
    const source = (this.#source = new EventSource("v1/indexing/events"));
    source.addEventListener("indexing", (event) => {
      this.state = JSON.parse(event.data);
      if (!this.isBusy) this.#stop();
      this.dispatchEvent(new Event("change"));
    });
    source.addEventListener("error", () => {
      // The browser reconnects by itself, unless the server refused.
      if (source.readyState === EventSource.CLOSED) this.#stop();
    });
  }

  get isBusy() {
    return this.state !== null && this.state.phase !== "idle";
  }

  #stop() {
    this.#source?.close();
    this.#source = null;
  }
}

/**
 * Returns the progress as a sentence.
 * @param {Indexing} state
 * @returns {string}
 */
export function progressText({ phase, done, total, rate }) {
  if (phase === "forgetting") return "Removing a folder";
  if (phase === "finding" || total == null) return done > 0 ? `Looking for photos: ${count(done)} files so far` : "Looking for photos";
  const left = rate > 0 ? (total - done) / rate : 0;
  const parts = [`Indexing ${count(done)} of ${count(total)} photos`];
  if (rate >= 1) parts.push(`${count(Math.round(rate))} per second`);
  if (left >= 60) parts.push(`${count(Math.ceil(left / 60))} min left`);
  return parts.join(" · ");
}

/**
 * Returns the result of the last update as a sentence.
 * @param {Indexing} state
 * @returns {string}
 */
export function resultText({ report, problem }) {
  if (problem) return [problem.message, problem.next].filter(Boolean).join(" ");
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
