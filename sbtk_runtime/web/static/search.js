// Scheduling of searches: throttled while a stroke is being drawn, immediate when it ends. Only the response
// to the latest search counts.

import { ApiError, query, recentPhotos, similar, similarToSeveral } from "./api.js";

/** @typedef {import("./api.js").QueryResponse} QueryResponse */
/** @typedef {import("./api.js").QueryOptions} QueryOptions */
/** @typedef {import("./filters.js").Filter} Filter */
/**
 * A search for photos similar to an image or to photos of the gallery, or a list of recent photos.
 * @typedef {{ kind: "recent", filter: Filter } |
 *   { kind: "similar", likes: number[], unlikes: number[], region: string, filter: Filter } |
 *   { kind: "sketch" | "photo", image: () => Promise<Blob | null>, unlikes: number[], filter: Filter }} Query
 */
/** @typedef {{ response: QueryResponse, query: Query, isMore: boolean }} SearchResult */

const FIRST_PAGE = 24;
const NEXT_PAGE = 96;
const THROTTLE_MS = 140;
const BUSY_RETRY_MS = 600;

/**
 * Dispatches "request" when a search is sent, "response" (detail: the SearchResult), "blank" when the image
 * shows nothing, and "failure" (detail: the ApiError).
 */
export class Search extends EventTarget {
  /** @type {AbortController | null} */
  #request = null;
  /** @type {number | undefined} */
  #timer;
  /** @type {Blob | null} */
  #image = null;
  #count = 0;
  #isStale = false;
  /** Whether the last response had as many photos as were asked for. */
  #isFull = false;

  /**
   * @param {() => Query} currentQuery
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
    void this.#send(false);
  }

  /** Requests the next page of hits for the same query. */
  loadMore() {
    if (this.#request === null && this.hasMore) void this.#send(true);
  }

  get hasMore() {
    return this.#isFull && this.#count < this.photoCount();
  }

  get isPending() {
    return this.#request !== null;
  }

  /** @param {boolean} isMore */
  async #send(isMore) {
    this.#request?.abort();
    this.#isStale = false;
    const request = new AbortController();
    this.#request = request;
    const current = this.currentQuery();
    const offset = isMore ? this.#count : 0;
    const limit = Math.max(1, Math.min(isMore ? NEXT_PAGE : FIRST_PAGE, this.photoCount() - offset));
    try {
      const response = await this.#fetch(current, { limit, offset, ...current.filter }, request.signal);
      if (request.signal.aborted) return;
      this.#request = null;
      if (response === null) {
        this.dispatchEvent(new Event("blank"));
      } else {
        this.#count = offset + response.hits.length;
        this.#isFull = response.hits.length === limit;
        this.dispatchEvent(new CustomEvent("response", { detail: { response, query: current, isMore } }));
      }
    } catch (error) {
      if (request.signal.aborted) return;
      this.#request = null;
      this.#handleError(error, isMore);
    }
    if (this.#isStale) this.schedule();
  }

  /**
   * @param {Query} current
   * @param {QueryOptions} options
   * @param {AbortSignal} signal
   * @returns {Promise<QueryResponse | null>} null if the image is blank
   */
  async #fetch(current, options, signal) {
    if (current.kind === "recent" || current.kind === "similar") {
      this.dispatchEvent(new Event("request"));
      if (current.kind === "recent") return recentPhotos(options, signal);
      const { likes, unlikes, region } = current;
      const isOne = likes.length === 1 && unlikes.length === 0;
      return isOne ? similar(likes[0], region, options, signal) : similarToSeveral(likes, unlikes, options, signal);
    }
    const image = options.offset > 0 ? this.#image : await current.image();
    if (image === null || signal.aborted) return null;
    this.#image = image;
    this.dispatchEvent(new Event("request"));
    return query(image, current.kind, current.unlikes, options, signal);
  }

  /**
   * @param {unknown} cause
   * @param {boolean} isMore
   */
  #handleError(cause, isMore) {
    const error = cause instanceof ApiError ? cause : new ApiError("internal", String(cause));
    if (error.code === "empty_sketch") {
      this.dispatchEvent(new Event("blank"));
    } else if (error.code === "busy") {
      const delayMs = Math.max(BUSY_RETRY_MS, Math.min(3000, error.retryMs));
      this.#timer ??= setTimeout(() => {
        this.#timer = undefined;
        void this.#send(isMore);
      }, delayMs);
    } else {
      this.dispatchEvent(new CustomEvent("failure", { detail: error }));
    }
  }
}
