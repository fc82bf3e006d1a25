// The frame around a part of a photo: where a hit was found, or what the user marks with pointer or keys.

import { shownSize } from "./dom.js";

/** @typedef {[number, number, number, number]} Region x, y, width and height as shares of the photo */

const LEAST_SHARE = 0.04;
const KEY_STEP = 0.02;
/** @type {Region} */
const MIDDLE = [0.25, 0.25, 0.5, 0.5];
/** @type {Record<string, [number, number]>} */
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Dispatches "change" when the user changes the region or marking starts or ends, and "choose" for Enter. */
export class RegionFrame extends EventTarget {
  /** @type {Region | null} */
  region = null;
  /** @type {{ x: number, y: number } | null} where a drag began */
  #start = null;
  /** @type {Region | null} before the drag */
  #before = null;

  /**
   * @param {HTMLElement} stage
   * @param {HTMLImageElement} image fills the stage, with margins
   * @param {HTMLElement} frame
   * @param {HTMLElement} layer over the stage, takes pointers and keys while a region is marked
   */
  constructor(stage, image, frame, layer) {
    super();
    this.stage = stage;
    this.image = image;
    this.frame = frame;
    this.layer = layer;
    layer.addEventListener("pointerdown", (event) => this.#press(event));
    layer.addEventListener("pointermove", (event) => this.#drag(event));
    layer.addEventListener("pointerup", () => this.#release());
    layer.addEventListener("pointercancel", () => this.#release());
    layer.addEventListener("keydown", (event) => this.#handleKey(event));
    image.addEventListener("load", () => this.place());
    new ResizeObserver(() => this.place()).observe(stage);
  }

  get isMarking() {
    return !this.layer.hidden;
  }

  /**
   * Shows a region, or none.
   * @param {Region | null} region
   */
  show(region) {
    this.region = region;
    this.layer.hidden = true;
    this.place();
    this.dispatchEvent(new Event("change"));
  }

  /** Lets the user mark a region, starting with the one that is shown or the middle. */
  mark() {
    this.region ??= MIDDLE;
    this.layer.hidden = false;
    this.layer.focus();
    this.place();
    this.dispatchEvent(new Event("change"));
  }

  /** Moves the frame to where the region is on the screen. */
  place() {
    const photo = this.#photoBox();
    this.frame.hidden = this.region === null || photo === null;
    if (this.region === null || photo === null) return;
    const [x, y, width, height] = this.region;
    const stage = this.stage.getBoundingClientRect();
    this.frame.style.left = `${photo.left - stage.left + x * photo.width}px`;
    this.frame.style.top = `${photo.top - stage.top + y * photo.height}px`;
    this.frame.style.width = `${width * photo.width}px`;
    this.frame.style.height = `${height * photo.height}px`;
  }

  /** Returns where the photo is on the screen, without the margins of its element; null if it is not loaded. */
  #photoBox() {
    const shown = shownSize(this.image);
    if (shown === null) return null;
    const box = this.image.getBoundingClientRect();
    const zoom = box.width / this.image.offsetWidth;
    const [width, height] = [shown.width * zoom, shown.height * zoom];
    return { left: box.left + (box.width - width) / 2, top: box.top + (box.height - height) / 2, width, height };
  }

  /** @param {PointerEvent} event @returns {{ x: number, y: number } | null} within the photo */
  #shareOf(event) {
    const photo = this.#photoBox();
    if (photo === null) return null;
    return { x: clamp((event.clientX - photo.left) / photo.width), y: clamp((event.clientY - photo.top) / photo.height) };
  }

  /** @param {PointerEvent} event */
  #press(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    this.layer.setPointerCapture(event.pointerId);
    this.#start = this.#shareOf(event);
    this.#before = this.region;
  }

  /** @param {PointerEvent} event */
  #drag(event) {
    const [start, end] = [this.#start, this.#shareOf(event)];
    if (start === null || end === null || !event.isPrimary) return;
    const [x, y] = [Math.min(start.x, end.x), Math.min(start.y, end.y)];
    this.#change([x, y, Math.abs(start.x - end.x), Math.abs(start.y - end.y)]);
  }

  #release() {
    if (this.#start === null) return;
    this.#start = null;
    // A click marks nothing.
    if (this.region !== null && Math.min(this.region[2], this.region[3]) < LEAST_SHARE) this.#change(this.#before);
  }

  /** @param {KeyboardEvent} event */
  #handleKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const direction = DIRECTIONS[event.key];
    if (direction !== undefined && this.region !== null) {
      const [dx, dy] = direction.map((sign) => sign * KEY_STEP);
      const [x, y, width, height] = this.region;
      if (event.shiftKey) {
        this.#change([x, y, clamp(width + dx, LEAST_SHARE, 1 - x), clamp(height + dy, LEAST_SHARE, 1 - y)]);
      } else {
        this.#change([clamp(x + dx, 0, 1 - width), clamp(y + dy, 0, 1 - height), width, height]);
      }
    } else if (event.key === "Enter") {
      this.dispatchEvent(new Event("choose"));
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  /** @param {Region | null} region */
  #change(region) {
    this.region = region;
    this.place();
    this.dispatchEvent(new Event("change"));
  }
}

/**
 * @param {number} value
 * @param {number} [low]
 * @param {number} [high]
 */
function clamp(value, low = 0, high = 1) {
  return Math.min(high, Math.max(low, value));
}
