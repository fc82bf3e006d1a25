// A client of the HTTP API of `sbtk serve`, for browsers, Node.js 18 or newer, Deno and Bun. Copy this file; it
// imports nothing. Its types are JSDoc, which `tsc --checkJs --strict` and editors check.
//
//     import { Client } from "./client.mjs";
//     const client = new Client("http://127.0.0.1:8000", { token });
//     const { hits } = await client.query(sketch, { limit: 5, under: "/srv/photos/2024" });

/** @typedef {"sketch" | "photo"} Kind */
/**
 * A path on the server's machine. One that is not UTF-8 comes as its bytes, in base64.
 * @typedef {{ id: number, path?: string, path_bytes?: string }} Copy
 */
/**
 * A photo that was found.
 * @typedef {object} Hit
 * @property {number} rank from 1
 * @property {number} score a cosine, at most 1
 * @property {number} id of the photo in the gallery
 * @property {string} [path]
 * @property {string} [path_bytes]
 * @property {"good" | "weak"} [match] whether the photo is close to the sketch
 * @property {[x: number, y: number, width: number, height: number]} [region] the part that was found, as shares
 * @property {Copy[]} [copies] other photos with the same bytes
 */
/**
 * The hits of a query, best first.
 * @typedef {object} Answer
 * @property {Hit[]} hits
 * @property {boolean} [no_close_match] whether the gallery may lack what was drawn
 * @property {Kind} [kind] what the image was searched as
 * @property {string[]} notices sentences for people
 * @property {number} generation
 * @property {string} engine
 * @property {number} took_ms
 */
/**
 * @typedef {object} Options
 * @property {Kind} [as] what the image is; detected by default
 * @property {number} [limit]
 * @property {number} [offset]
 * @property {string} [under] search only this folder
 * @property {string} [taken_from] search only photos of this day, such as "2024-05-01", or later
 * @property {string} [taken_to] search only photos of this day or before
 * @property {boolean} [fold] one hit for photos with the same bytes
 * @property {"none" | "expand" | "diffusion"} [rerank]
 * @property {boolean} [regions]
 * @property {readonly number[]} [like] ids of photos
 * @property {readonly number[]} [unlike] ids of photos
 */
/**
 * What a photo's file says about itself.
 * @typedef {{ width_px?: number, height_px?: number, taken?: string, camera?: string, lens?: string,
 *   exposure?: string, latitude?: number, longitude?: number }} Details
 */
/** @typedef {{ token?: string, timeoutMs?: number, attempts?: number }} ClientOptions */

const MOST_WAIT_MS = 30_000;

/** The server refused a request, or could not be reached. */
export class ApiError extends Error {
  /**
   * @param {string} code for programs, such as "empty_sketch"; "unreachable" if there was no response
   * @param {string} message one sentence for people
   * @param {string} next what to do about it; may be empty
   * @param {number | null} retryAfterMs when to try again; null if that would not help
   */
  constructor(code, message, next = "", retryAfterMs = null) {
    super(message);
    this.name = "ApiError";
    this.code = code;
    this.next = next;
    this.retryAfterMs = retryAfterMs;
  }
}

/** A client of one server. */
export class Client {
  #address;
  #options;

  /**
   * @param {string} [address] of the page, such as the one that `sbtk serve` prints
   * @param {ClientOptions} [options] `attempts` is how often to send a request while the server is busy
   */
  constructor(address = "http://127.0.0.1:8000", options = {}) {
    this.#address = address.replace(/\/+$/, "");
    this.#options = { timeoutMs: 20_000, attempts: 3, ...options };
  }

  /**
   * Returns the photos that look like an image (PNG, JPEG or WebP).
   * @param {Blob} image
   * @param {Options} [options]
   * @returns {Promise<Answer>}
   */
  query(image, options = {}) {
    return this.#json(withParameters("/v1/query", options), formOf([image]));
  }

  /**
   * Returns the answer of each of up to 32 images, or the error of an image.
   * @param {readonly Blob[]} images
   * @param {Omit<Options, "like" | "unlike">} [options]
   * @returns {Promise<(Answer | ApiError)[]>}
   */
  async queryMany(images, options = {}) {
    const { results } = await this.#json(withParameters("/v1/queries", options), formOf(images));
    return results.map((/** @type {any} */ result) =>
      result.error === undefined ? result : errorOf(result.error),
    );
  }

  /**
   * Returns the photos that look like one of the gallery.
   * @param {number} photoId
   * @param {Omit<Options, "as" | "like" | "unlike">} [options]
   * @returns {Promise<Answer>}
   */
  similar(photoId, options = {}) {
    return this.#json(withParameters(`/v1/photos/${photoId}/similar`, options));
  }

  /**
   * @param {number} photoId
   * @returns {Promise<Details>}
   */
  details(photoId) {
    return this.#json(`/v1/photos/${photoId}/details`);
  }

  /**
   * Returns a photo's file.
   * @param {number} photoId
   * @returns {Promise<Blob>}
   */
  async photoFile(photoId) {
    return (await this.#send(`/v1/photos/${photoId}/file`)).blob();
  }

  /**
   * Yields all photos of the gallery, best first, page by page.
   * @param {Blob} image
   * @param {Options} [options]
   * @returns {AsyncGenerator<Hit, void, undefined>}
   */
  async *allHits(image, options = {}) {
    let offset = options.offset ?? 0;
    for (;;) {
      const { hits } = await this.query(image, { limit: 100, ...options, offset });
      if (hits.length === 0) return;
      yield* hits;
      offset += hits.length;
    }
  }

  /**
   * @param {string} path
   * @param {FormData} [body]
   * @returns {Promise<any>}
   */
  async #json(path, body) {
    return (await this.#send(path, body)).json();
  }

  /**
   * @param {string} path
   * @param {FormData} [body]
   * @returns {Promise<Response>}
   */
  async #send(path, body) {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#sendOnce(path, body);
      } catch (error) {
        const waitMs = error instanceof ApiError ? error.retryAfterMs : null;
        if (waitMs === null || waitMs > MOST_WAIT_MS || attempt >= this.#options.attempts) throw error;
        await new Promise((resolve) => setTimeout(resolve, waitMs));
      }
    }
  }

  /**
   * @param {string} path
   * @param {FormData} [body]
   * @returns {Promise<Response>}
   */
  async #sendOnce(path, body) {
    const { token, timeoutMs } = this.#options;
    /** @type {RequestInit} */
    const init = { signal: AbortSignal.timeout(timeoutMs) };
    if (token !== undefined) init.headers = { Authorization: `Bearer ${token}` };
    if (body !== undefined) Object.assign(init, { method: "POST", body });
    let response;
    try {
      response = await fetch(this.#address + path, init);
    } catch {
      throw new ApiError("unreachable", `${this.#address} cannot be reached.`, "start it with 'sbtk serve'");
    }
    if (response.ok) return response;
    const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
    const retryAfterMs = Number.isNaN(seconds) ? null : seconds * 1000;
    // A proxy in between answers in its own way.
    const found = await response.json().catch(() => null);
    throw typeof found?.error?.code === "string"
      ? errorOf(found.error, retryAfterMs)
      : new ApiError("unreachable", `The server returned status ${response.status}.`, "", retryAfterMs);
  }
}

/**
 * @param {string} path
 * @param {Options} options
 */
function withParameters(path, options) {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  return given.length > 0 ? `${path}?${new URLSearchParams(given.map(([name, value]) => [name, String(value)]))}` : path;
}

/** @param {readonly Blob[]} images */
function formOf(images) {
  const form = new FormData();
  for (const image of images) form.append("image", image);
  return form;
}

/**
 * @param {{ code: string, message: string, next?: string }} body
 * @param {number | null} [retryAfterMs]
 */
function errorOf({ code, message, next }, retryAfterMs = null) {
  return new ApiError(code, message, next, retryAfterMs);
}
