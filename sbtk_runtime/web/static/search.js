// When to ask, and whose answer counts: while the pen moves now and then, at once when it is
// lifted, and always the newest question only.

import { Problem, query, similar } from "./api.js";

/** @typedef {import("./api.js").Answer} Answer */
/**
 * What is looked for: photos like an image, or like a photo of the gallery.
 * @typedef {{ like: number, under: string } |
 *   { image: () => Promise<Blob | null>, kind: "sketch" | "photo", under: string }} Question
 */

const FIRST = 24;
const MOST = 200;
const WHILE_DRAWING_MS = 140;
const BUSY_MS = 600;

/**
 * Dispatches "ask" when a question goes out, "answer" (detail: answer, isMore) and "blank" when there
 * is nothing to look for, and "problem" (detail: the Problem).
 */
export class Search extends EventTarget {
  /** @type {AbortController | null} */
  #asking = null;
  /** @type {number | undefined} */
  #timer;
  /** @type {Blob | null} */
  #image = null;
  #wanted = FIRST;
  #isStale = false;

  /**
   * @param {() => Question | null} question says what is looked for at that moment
   * @param {() => number} searchable says how many photos there are to find
   */
  constructor(question, searchable) {
    super();
    this.question = question;
    this.searchable = searchable;
  }

  /** Asks in a moment: once for all that changes until then, and not before the last answer came. */
  soon() {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      if (this.#asking === null) this.#start();
      else this.#isStale = true;
    }, WHILE_DRAWING_MS);
  }

  /** Asks at once; what was asked before no longer matters. */
  now() {
    this.#start();
  }

  /** Asks for more hits of the same question; says whether there may be any. */
  more() {
    if (this.#asking !== null || !this.mayHaveMore) return false;
    this.#wanted = Math.min(MOST, this.#wanted + 2 * FIRST);
    void this.#ask(true);
    return true;
  }

  get isAsking() {
    return this.#asking !== null;
  }

  get mayHaveMore() {
    return this.#wanted < Math.min(MOST, this.searchable());
  }

  #start() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#wanted = FIRST;
    void this.#ask(false);
  }

  /** @param {boolean} isMore */
  async #ask(isMore) {
    this.#asking?.abort();
    this.#isStale = false;
    const asking = new AbortController();
    this.#asking = asking;
    try {
      const answer = await this.#answer(asking.signal, isMore);
      if (asking.signal.aborted) return;
      this.#asking = null;
      if (answer === null) this.dispatchEvent(new Event("blank"));
      else this.dispatchEvent(new CustomEvent("answer", { detail: { answer, isMore } }));
    } catch (error) {
      if (asking.signal.aborted) return;
      this.#asking = null;
      this.#failed(error);
    }
    if (this.#isStale) this.soon();
  }

  /**
   * @param {AbortSignal} signal
   * @param {boolean} isMore
   * @returns {Promise<Answer | null>}
   */
  async #answer(signal, isMore) {
    const question = this.question();
    if (question === null) return null;
    const wanted = { k: Math.max(1, Math.min(this.#wanted, this.searchable())), under: question.under };
    if ("like" in question) {
      this.dispatchEvent(new Event("ask"));
      return similar(question.like, wanted, signal);
    }
    const image = isMore ? this.#image : await question.image();
    if (image === null || signal.aborted) return null;
    this.#image = image;
    this.dispatchEvent(new Event("ask"));
    return query(image, question.kind, wanted, signal);
  }

  /** @param {unknown} error */
  #failed(error) {
    const problem = error instanceof Problem ? error : new Problem("fault", String(error));
    if (problem.code === "empty_sketch") {
      this.dispatchEvent(new Event("blank"));
    } else if (problem.code === "busy") {
      this.#timer ??= setTimeout(() => this.#start(), Math.max(BUSY_MS, Math.min(3000, problem.retryMs)));
    } else {
      this.dispatchEvent(new CustomEvent("problem", { detail: problem }));
    }
  }
}
