// The part of the page with the photos: asks, and shows the answer or why there is none.

import { Problem, gallery, photo, thumbnailUrl } from "./api.js";
import { announceSoon } from "./announce.js";
import { choicesFrom, fill } from "./folders.js";
import { nameOf } from "./names.js";
import { byId } from "./page.js";
import {
  emptyFolderMessage,
  emptyGalleryMessage,
  noOtherPhotoMessage,
  noPhotoMessage,
  problemMessage,
  serverMessage,
  showMessage,
  welcomeMessage,
} from "./panel.js";
import { Results, scoreText } from "./results.js";
import { Search } from "./search.js";
import { showServer } from "./server_line.js";

/** @typedef {import("./api.js").Answer} Answer */
/** @typedef {import("./api.js").Gallery} Gallery */
/** @typedef {import("./folders.js").Choice} Choice */
/** @typedef {import("./health.js").Watch} Watch */
/** @typedef {import("./search.js").Question} Question */

const NEAR_PX = 500;

export class Finds {
  results = new Results(byId("hits", HTMLOListElement));
  /** @type {Gallery | null} */
  #gallery = null;
  /** @type {Choice[]} */
  #choices = [];
  /** @type {Problem | null} */
  #problem = null;
  /** @type {number | null} */
  #like = null;
  #isAnswered = false;
  /** Nothing to look for: a paper nobody drew on, or one that was rubbed blank. */
  #isBlank = false;
  /** @type {number | null} of the last answer */
  #generation = null;
  #isWell = false;
  #folder = byId("folder", HTMLSelectElement);
  #region = byId("finds", HTMLElement);
  #more = byId("more", HTMLButtonElement);

  /**
   * @param {Watch} watch
   * @param {() => Question | null} question
   */
  constructor(watch, question) {
    this.watch = watch;
    this.question = question;
    this.search = new Search(question, () => this.#searchable);
    this.search.addEventListener("ask", () => this.#region.setAttribute("aria-busy", "true"));
    this.search.addEventListener("answer", (event) => {
      const { answer, isMore } = /** @type {CustomEvent} */ (event).detail;
      this.#answered(answer, isMore);
    });
    this.search.addEventListener("blank", () => this.#blank());
    this.search.addEventListener("problem", (event) => this.#failed(/** @type {CustomEvent} */ (event).detail));
    watch.addEventListener("change", () => this.#serverChanged());
    this.#more.addEventListener("click", () => this.search.more());
    byId("panel-retry", HTMLButtonElement).addEventListener("click", () => this.ask());
    window.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.#show();
  }

  ask() {
    this.#isAnswered = false;
    this.search.now();
  }

  askSoon() {
    this.search.soon();
  }

  /**
   * Shows photos like one, or like the drawing again.
   * @param {number | null} id
   */
  showLike(id) {
    if (id === this.#like) return;
    this.#like = id;
    byId("like", HTMLElement).hidden = id === null;
    if (id !== null) void this.#introduce(id);
    this.ask();
    if (this.#region.getBoundingClientRect().top < 0) this.#region.scrollIntoView();
  }

  #scrolled() {
    const isNearEnd = this.#more.getBoundingClientRect().top < window.innerHeight + NEAR_PX;
    if (isNearEnd && !this.#more.hidden) this.search.more();
  }

  /** @param {number} id */
  async #introduce(id) {
    byId("like-image", HTMLImageElement).src = thumbnailUrl(id, 180);
    const name = byId("like-name", HTMLElement);
    const hit = this.results.hits.find((one) => one.id === id);
    name.textContent = hit ? nameOf(hit) : `photo ${id}`;
    if (hit) return;
    try {
      const found = await photo(id);
      if (this.#like === id) name.textContent = nameOf(found);
    } catch {
      // The search itself says what is wrong.
    }
  }

  /**
   * @param {Answer} answer
   * @param {boolean} isMore
   */
  #answered(answer, isMore) {
    this.#region.setAttribute("aria-busy", "false");
    this.#problem = null;
    this.#isAnswered = true;
    this.#isBlank = false;
    // Photos of two generations do not go together; an answer with more has the first ones too.
    const isOther = answer.generation !== this.#generation;
    this.#generation = answer.generation;
    const { hits } = answer;
    let isAnyNew = true;
    if (isMore && !isOther) isAnyNew = this.results.append(hits) > 0;
    else this.results.show(hits);
    performance.clearMarks("sbtk:shown");
    performance.mark("sbtk:shown", { detail: { hits: hits.length, isMore } });
    this.#more.hidden = !isAnyNew || hits.length === 0 || !this.search.mayHaveMore;
    const took = isMore ? "" : ` · ${Math.max(1, Math.round(answer.took_ms))} ms`;
    byId("summary", HTMLElement).textContent = hits.length > 0 ? `${this.#countText()}${took}` : "";
    const notices = byId("notices", HTMLElement);
    // An empty gallery is told more of in the panel.
    notices.textContent = this.#gallery?.count === 0 ? "" : (answer.notices ?? []).join(" · ");
    notices.hidden = notices.textContent === "";
    if (!isMore && hits.length > 0) {
      announceSoon(`${hits.length} photos found. Closest: ${nameOf(hits[0])}, score ${scoreText(hits[0].score)}.`);
    } else if (isMore && isAnyNew) {
      announceSoon(`${this.results.hits.length} photos are shown.`);
    }
    if (this.#gallery !== null && answer.generation !== this.#gallery.generation) void this.watch.look();
    this.#show();
  }

  #blank() {
    this.#isBlank = true;
    this.#region.setAttribute("aria-busy", "false");
    this.#problem = null;
    this.#forgetHits();
    this.#show();
  }

  /** @param {Problem} problem */
  #failed(problem) {
    this.#region.setAttribute("aria-busy", "false");
    this.watch.met(problem);
    // What the server's state explains is told by that.
    const isOfServer = ["gone", "loading", "no_token"].includes(problem.code);
    this.#problem = isOfServer ? null : problem;
    if (!isOfServer) this.#forgetHits();
    this.#show();
  }

  #serverChanged() {
    const wasWell = this.#isWell;
    this.#isWell = this.watch.condition === "ok";
    if (this.#isWell) {
      this.results.retry();
      void this.#readGallery();
      const isOld = this.#generation !== this.watch.health.generation;
      if ((!wasWell || isOld) && this.question() !== null && !this.search.isAsking) this.ask();
    }
    showServer(this.watch, this.#gallery);
    this.#show();
  }

  async #readGallery() {
    if (this.#gallery !== null && this.#gallery.generation === this.watch.health.generation) return;
    try {
      this.#gallery = await gallery();
    } catch (error) {
      if (error instanceof Problem) this.watch.met(error);
      return;
    }
    this.#choices = choicesFrom(this.#gallery.folders);
    const chosen = this.#folder.value;
    fill(this.#folder, this.#choices);
    if (this.#folder.value !== chosen && this.question() !== null) this.ask();
    byId("folder-field", HTMLElement).hidden = this.#choices.length < 2;
    showServer(this.watch, this.#gallery);
    this.#show();
  }

  /** @returns {number} how many photos can be found where somebody looks */
  get #searchable() {
    const choice = this.#choices.find(({ path }) => path === this.#folder.value);
    return choice?.count ?? this.#gallery?.count ?? this.watch.health.photos ?? Infinity;
  }

  #countText() {
    const shown = this.results.hits.length.toLocaleString("en");
    const all = this.#searchable;
    return Number.isFinite(all) ? `${shown} of ${all.toLocaleString("en")}` : shown;
  }

  #forgetHits() {
    this.results.clear();
    this.#more.hidden = true;
    byId("summary", HTMLElement).textContent = "";
    byId("notices", HTMLElement).hidden = true;
  }

  #show() {
    const isEmpty = this.results.hits.length === 0;
    this.#region.classList.toggle("has-hits", !isEmpty);
    showMessage(serverMessage(this.watch.condition, this.watch.health) ?? this.#message(isEmpty));
  }

  /** @param {boolean} isEmpty */
  #message(isEmpty) {
    if (this.#problem?.code === "no_photo") return noPhotoMessage();
    if (this.#problem !== null) return problemMessage(this.#problem.message, this.#problem.next, true);
    if (this.#gallery?.count === 0) return emptyGalleryMessage();
    if (!isEmpty) return null;
    if (this.#isBlank || this.question() === null) return welcomeMessage(this.#gallery?.count ?? 0);
    if (!this.#isAnswered || this.#gallery === null) return null;
    return this.#folder.value === "" ? noOtherPhotoMessage() : emptyFolderMessage();
  }
}
