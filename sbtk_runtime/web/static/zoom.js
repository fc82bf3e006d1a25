// Zooming, panning and swiping of the enlarged photo, with wheel, mouse, fingers and keys.

import { shownSize } from "./dom.js";

const MAX_SCALE = 8;
const STEP = 1.5;
const SWIPE_PX = 50;

/** Dispatches "scale" when the scale changes, "move" when the photo moves, and "swipe" (detail: 1 for the next photo, -1 for the previous one). */
export class Zoom extends EventTarget {
  scale = 1;
  #x = 0;
  #y = 0;
  /** @type {Map<number, PointerEvent>} the pointers that are down */
  #pointers = new Map();
  /** @type {{ x: number, y: number } | null} where a swipe began */
  #start = null;

  /**
   * @param {HTMLElement} stage
   * @param {HTMLImageElement} image fills the stage
   */
  constructor(stage, image) {
    super();
    this.stage = stage;
    this.image = image;
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("dblclick", (event) => {
      if (event.target === image) this.zoomTo(this.scale > 1 ? 1 : 2.5, event);
    });
    image.addEventListener("pointerdown", (event) => this.#press(event));
    image.addEventListener("pointermove", (event) => this.#move(event));
    image.addEventListener("pointerup", (event) => this.#release(event));
    image.addEventListener("pointercancel", (event) => this.#release(event));
    new ResizeObserver(() => this.place()).observe(stage);
  }

  /** Shows the whole photo. */
  reset() {
    this.#pointers.clear();
    this.zoomTo(1);
  }

  /** @param {1 | -1} direction 1 enlarges */
  step(direction) {
    this.zoomTo(direction > 0 ? this.scale * STEP : this.scale / STEP);
  }

  /**
   * @param {number} scale
   * @param {{ clientX: number, clientY: number }} [center] stays where it is; the middle by default
   */
  zoomTo(scale, center) {
    const next = Math.min(MAX_SCALE, Math.max(1, scale < 1.05 ? 1 : scale));
    const box = this.stage.getBoundingClientRect();
    const dx = center ? center.clientX - box.left - box.width / 2 : 0;
    const dy = center ? center.clientY - box.top - box.height / 2 : 0;
    const ratio = next / this.scale;
    this.#x = dx - (dx - this.#x) * ratio;
    this.#y = dy - (dy - this.#y) * ratio;
    this.scale = next;
    this.place();
    this.dispatchEvent(new Event("scale"));
  }

  /**
   * Moves a zoomed photo.
   * @param {number} dx in pixels
   * @param {number} dy in pixels
   */
  pan(dx, dy) {
    this.#x += dx;
    this.#y += dy;
    this.place();
  }

  /** Moves the photo so that it fills the stage, or is in its middle where it is smaller. */
  place() {
    const { clientWidth, clientHeight } = this.stage;
    const { width, height } = shownSize(this.image) ?? { width: clientWidth, height: clientHeight };
    const roomX = Math.max(0, width * this.scale - clientWidth) / 2;
    const roomY = Math.max(0, height * this.scale - clientHeight) / 2;
    this.#x = Math.min(roomX, Math.max(-roomX, this.#x));
    this.#y = Math.min(roomY, Math.max(-roomY, this.#y));
    this.image.style.transform = this.scale === 1 ? "" : `translate(${this.#x}px, ${this.#y}px) scale(${this.scale})`;
    this.image.classList.toggle("is-zoomed", this.scale > 1);
    this.dispatchEvent(new Event("move"));
  }

  /** @param {WheelEvent} event */
  #wheel(event) {
    event.preventDefault();
    // Browsers report a pinch on a touchpad as a wheel with Ctrl.
    const speed = event.ctrlKey ? 0.01 : 0.0015;
    const pixels = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? event.deltaY * 30 : event.deltaY;
    this.zoomTo(this.scale * Math.exp(-pixels * speed), event);
  }

  /** @param {PointerEvent} event */
  #press(event) {
    if (event.button !== 0) return;
    this.image.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, event);
    const isSwipe = this.#pointers.size === 1 && this.scale === 1 && event.pointerType !== "mouse";
    this.#start = isSwipe ? { x: event.clientX, y: event.clientY } : null;
  }

  /** @param {PointerEvent} event */
  #move(event) {
    const last = this.#pointers.get(event.pointerId);
    if (last === undefined) return;
    const other = [...this.#pointers.values()].find(({ pointerId }) => pointerId !== event.pointerId);
    this.#pointers.set(event.pointerId, event);
    if (other !== undefined) {
      const center = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
      this.zoomTo((this.scale * distance(event, other)) / Math.max(1, distance(last, other)), center);
    }
    const share = other === undefined ? 1 : 0.5;
    if (this.scale > 1) this.pan((event.clientX - last.clientX) * share, (event.clientY - last.clientY) * share);
  }

  /** @param {PointerEvent} event */
  #release(event) {
    const start = this.#pointers.delete(event.pointerId) && event.type === "pointerup" ? this.#start : null;
    this.#start = null;
    if (start === null || this.scale > 1) return;
    const [dx, dy] = [event.clientX - start.x, event.clientY - start.y];
    if (Math.abs(dx) < SWIPE_PX || Math.abs(dx) < 2 * Math.abs(dy)) return;
    this.dispatchEvent(new CustomEvent("swipe", { detail: dx < 0 ? 1 : -1 }));
  }
}

/**
 * @param {PointerEvent} a
 * @param {PointerEvent} b
 */
function distance(a, b) {
  return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
}
