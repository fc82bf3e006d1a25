// Scheduling of searches: throttled while a stroke is being drawn, immediate when it ends. Only the response
// to the latest search counts.

import { ApiError, query, similar } from "./api.js";

/** @typedef {import("./api.js").QueryResponse} QueryResponse */
/**
 * A search for photos similar to an image, or to a photo of the gallery.
 * @typedef {{ like: number, under: string } |
 *   { image: () => Promise<Blob | null>, kind: "sketch" | "photo", under: string }} Query
 */

const PAGE_SIZE = 24;
const MAX_HITS = 200;
const THROTTLE_MS = 140;
const BUSY_RETRY_MS = 600;

/**
 * Dispatches "request" when a search is sent, "response" (detail: response, isMore), "blank" when there is
 * nothing to search for, and "failure" (detail: the ApiError).
 */
export class Search extends EventTarget {
  /** @type {AbortController | null} */
  #request = null;
  /** @type {number | undefined} */
  #timer;
  /** @type {Blob | null} */
  #image = null;
  #limit = PAGE_SIZE;
  #isStale = false;

  /**
   * @param {() => Query | null} currentQuery
   * @param {() => number} photoCount the number of photos that can be found
   */
  constructor(currentQuery, photoCount) {
    super();
    this.currentQuery = currentQuery;
    this.photoCount = photoCount;
  }

  /** Searches soon, once for all changes until then, and not before the previous response. */
  schedule() {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      if (this.#request === null) this.run();
      else this.#isStale = true;
    }, THROTTLE_MS);
  }

  /** Searches now and cancels the previous search. */
  run() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#limit = PAGE_SIZE;
    void this.#send(false);
  }

  /** Requests more hits for the same query. */
  loadMore() {
    if (this.#request !== null || !this.hasMore) return;
    this.#limit = Math.min(MAX_HITS, this.#limit + 2 * PAGE_SIZE);
    void this.#send(true);
  }

  get isPending() {
    return this.#request !== null;
  }

  get hasMore() {
    return this.#limit < Math.min(MAX_HITS, this.photoCount());
  }

  /** @param {boolean} isMore */
  async #send(isMore) {
    this.#request?.abort();
    this.#isStale = false;
    const request = new AbortController();
    this.#request = request;
    try {
      const response = await this.#fetch(request.signal, isMore);
      if (request.signal.aborted) return;
      this.#request = null;
      if (response === null) this.dispatchEvent(new Event("blank"));
      else this.dispatchEvent(new CustomEvent("response", { detail: { response, isMore } }));
    } catch (error) {
      if (request.signal.aborted) return;
      this.#request = null;
      this.#handleError(error);
    }
    if (this.#isStale) this.schedule();
  }

  /**
   * @param {AbortSignal} signal
   * @param {boolean} isMore
   * @returns {Promise<QueryResponse | null>}
   */
  async #fetch(signal, isMore) {
    const current = this.currentQuery();
    if (current === null) return null;
    const options = { k: Math.max(1, Math.min(this.#limit, this.photoCount())), under: current.under };
    if ("like" in current) {
      this.dispatchEvent(new Event("request"));
      return similar(current.like, options, signal);
    }
    const image = isMore ? this.#image : await current.image();
    if (image === null || signal.aborted) return null;
    this.#image = image;
    this.dispatchEvent(new Event("request"));
    return query(image, current.kind, options, signal);
  }

  /** @param {unknown} cause */
  #handleError(cause) {
    const error = cause instanceof ApiError ? cause : new ApiError("internal", String(cause));
    if (error.code === "empty_sketch") {
      this.dispatchEvent(new Event("blank"));
    } else if (error.code === "busy") {
      this.#timer ??= setTimeout(() => this.run(), Math.max(BUSY_RETRY_MS, Math.min(3000, error.retryMs)));
    } else {
      this.dispatchEvent(new CustomEvent("failure", { detail: error }));
    }
  }
}
