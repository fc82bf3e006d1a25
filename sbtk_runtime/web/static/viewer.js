// The viewer: one enlarged photo with its path, and the way to similar photos.

import { ApiError, fileUrl, getDetails, getFolders, getPhoto, problemText, showFolder, thumbnailUrl } from "./api.js";
import { byId, copyText, setEnabled, showPath, showToast } from "./dom.js";
import { showDetails } from "./photo_details.js";
import { displayName, displayPath } from "./paths.js";
import { RegionFrame } from "./region_frame.js";
import { copiesText, scoreText } from "./results_grid.js";
import { closePhoto, currentState, replaceState } from "./url_state.js";
import { Zoom } from "./zoom.js";

/** @typedef {import("./api.js").Hit} Hit */
/** @typedef {import("./api.js").Photo} Photo */
/** @typedef {import("./results_grid.js").ResultsGrid} ResultsGrid */

const SIZES_PX = [720, 1600];
// Enlarged further, the thumbnail would be blurred.
const FILE_FROM_SCALE = 1.8;
const PAN_PX = 80;

/**
 * Dispatches "like" and "unlike" (detail: the photo's id) when the user asks for more or fewer such photos, and
 * "like-part" (detail: `id` and `region`) when the user asks for photos like a part of it.
 */
export class Viewer extends EventTarget {
  /** @type {number | null} */
  id = null;
  #dialog = byId("viewer", HTMLDialogElement);
  #image = byId("viewer-image", HTMLImageElement);
  #request = new AbortController();
  /** @type {Photo | null} */
  #photo = null;
  /** @type {boolean | null} whether the server opens folders for this browser; null if it is not known yet */
  #canShow = null;
  #zoom = new Zoom(byId("viewer-stage", HTMLElement), byId("viewer-image", HTMLImageElement));
  #frame = new RegionFrame(
    byId("viewer-stage", HTMLElement),
    byId("viewer-image", HTMLImageElement),
    byId("viewer-region", HTMLElement),
    byId("viewer-marking", HTMLElement),
  );

  /** @param {ResultsGrid} grid */
  constructor(grid) {
    super();
    this.grid = grid;
    // Browsers can close dialogs without a "cancel" event, for example for a second Escape.
    this.#dialog.addEventListener("close", () => {
      if (this.id !== null && !this.#dialog.open) closePhoto();
    });
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close();
    });
    this.#dialog.addEventListener("keydown", (event) => this.#handleKey(event));
    byId("viewer-close", HTMLButtonElement).addEventListener("click", () => this.#dialog.close());
    byId("viewer-previous", HTMLButtonElement).addEventListener("click", () => this.#step(-1));
    byId("viewer-next", HTMLButtonElement).addEventListener("click", () => this.#step(1));
    byId("viewer-copy", HTMLButtonElement).addEventListener("click", () => void this.#copyPath());
    byId("viewer-copy-image", HTMLButtonElement).addEventListener("click", () => void this.#copyImage());
    byId("viewer-folder", HTMLButtonElement).addEventListener("click", () => void this.#openFolder());
    byId("viewer-like", HTMLButtonElement).addEventListener("click", () => this.#judge("like"));
    byId("viewer-unlike", HTMLButtonElement).addEventListener("click", () => this.#judge("unlike"));
    byId("viewer-zoom-in", HTMLButtonElement).addEventListener("click", () => this.#zoom.step(1));
    byId("viewer-zoom-out", HTMLButtonElement).addEventListener("click", () => this.#zoom.step(-1));
    this.#zoom.addEventListener("swipe", (event) => this.#step(/** @type {CustomEvent<number>} */ (event).detail));
    this.#zoom.addEventListener("scale", () => this.#sharpen());
    this.#zoom.addEventListener("move", () => this.#frame.place());
    this.#frame.addEventListener("change", () => this.#showMarking());
    this.#frame.addEventListener("choose", () => this.#likePart());
    byId("viewer-mark", HTMLButtonElement).addEventListener("click", () => this.#toggleMarking());
    byId("viewer-like-part", HTMLButtonElement).addEventListener("click", () => this.#likePart());
    this.#image.addEventListener("error", () =>
      this.#showError("Cannot display this photo. The file may have been moved or deleted."),
    );
    this.#image.addEventListener("load", () => {
      // A thumbnail that is smaller than was asked for is the whole photo, which is not enlarged.
      const { naturalWidth, naturalHeight, src } = this.#image;
      const sizePx = Number(/[?&]size=(\d+)/.exec(src)?.[1] ?? 0);
      this.#image.classList.toggle("is-reduced", Math.max(naturalWidth, naturalHeight) >= sizePx - 1);
      this.#zoom.place();
    });
  }

  /** @param {number} id */
  open(id) {
    if (this.id === id) return;
    this.id = id;
    this.#request.abort();
    this.#request = new AbortController();
    this.#photo = null;
    const hit = this.#hit(id);
    this.#dialog.classList.remove("has-error");
    this.#showImage(id);
    this.#frame.show(hit?.region ?? null);
    this.#showName(hit ? displayName(hit) : "Photo", hit ? displayPath(hit) : "");
    byId("viewer-details", HTMLElement).textContent = "";
    showDetails(null);
    this.#zoom.reset();
    // Without a search, there is nothing that could become less like a photo.
    byId("viewer-unlike", HTMLElement).hidden = hit?.score === undefined && currentState().likes.length === 0;
    this.#showCopies(hit);
    byId("viewer-file", HTMLAnchorElement).href = fileUrl(id);
    byId("viewer-download", HTMLAnchorElement).href = fileUrl(id);
    setEnabled([
      [byId("viewer-previous", HTMLButtonElement), this.#neighbour(-1) !== null],
      [byId("viewer-next", HTMLButtonElement), this.#neighbour(1) !== null],
      [byId("viewer-close", HTMLButtonElement), true],
    ]);
    if (!this.#dialog.open) this.#dialog.showModal();
    void this.#offerFolder();
    void this.#loadDetails(id, this.#request.signal);
    // Metadata are an addition: what is wrong with the file is shown by the image.
    const { signal } = this.#request;
    getDetails(id, signal).then((details) => {
      if (signal.aborted) return;
      showDetails(details);
      // The photo may have been turned or cropped, so the part that was found can be anywhere.
      if (details.is_changed && !this.#frame.isMarking) this.#frame.show(null);
    }, () => undefined);
  }

  close() {
    const { id } = this;
    if (id === null) return;
    this.id = null;
    this.#request.abort();
    this.#image.removeAttribute("src");
    this.#dialog.close();
    this.grid.focus(id);
  }

  /**
   * Shows the loaded thumbnail, if any, until the large image is decoded.
   * @param {number} id
   */
  #showImage(id) {
    const thumbnail = this.grid.thumbnailOf(id);
    const neededPx = Math.min(2, window.devicePixelRatio) * Math.min(window.innerWidth, window.innerHeight);
    const large = new Image();
    large.src = thumbnailUrl(id, neededPx <= SIZES_PX[0] ? SIZES_PX[0] : SIZES_PX[1]);
    this.#image.classList.toggle("is-preview", thumbnail !== null);
    // Otherwise the previous photo stays visible while this one loads.
    if (thumbnail === null) this.#image.removeAttribute("src");
    this.#image.src = thumbnail ?? large.src;
    if (thumbnail === null) return;
    const showLarge = () => {
      if (this.id !== id) return;
      this.#image.src = large.src;
      this.#image.classList.remove("is-preview");
    };
    large.decode().then(showLarge, showLarge);
  }

  /**
   * @param {number} id
   * @param {AbortSignal} signal
   */
  async #loadDetails(id, signal) {
    try {
      const photo = await getPhoto(id, signal);
      this.#photo = photo;
      this.#showName(displayName(photo), displayPath(photo));
      const date = new Date(photo.modified).toLocaleDateString("en-GB", { dateStyle: "long" });
      const score = this.#hit(id)?.score;
      const rank = score === undefined ? [] : [`Result ${this.grid.positionOf(id) + 1}, score ${scoreText(score)}`];
      const facts = [sizeText(photo.size_bytes), date, ...rank].map((fact) => fact.replaceAll(" ", "\u00a0"));
      byId("viewer-details", HTMLElement).textContent = facts.join("\u00a0· ");
    } catch (error) {
      if (!signal.aborted && error instanceof ApiError) this.#showError(error.message);
    }
  }

  /**
   * Lists the photos that are identical to a hit.
   * @param {Hit | undefined} hit
   */
  #showCopies(hit) {
    const details = byId("viewer-copies", HTMLDetailsElement);
    details.hidden = !hit?.copies?.length;
    details.open = false;
    const summary = details.querySelector("summary");
    if (summary !== null) summary.textContent = hit ? copiesText(hit) : "";
    const items = (hit?.copies ?? []).map((copy) => {
      const item = document.createElement("li");
      item.textContent = displayPath(copy);
      return item;
    });
    details.querySelector("ul")?.replaceChildren(...items);
  }

  /**
   * @param {string} name
   * @param {string} path
   */
  #showName(name, path) {
    showPath(byId("viewer-name", HTMLElement), name);
    showPath(byId("viewer-path", HTMLElement), path);
    byId("viewer-copy", HTMLButtonElement).disabled = path === "";
    this.#image.alt = name;
  }

  /** @param {string} text */
  #showError(text) {
    if (this.id === null || !this.#image.hasAttribute("src")) return;
    this.#dialog.classList.add("has-error");
    byId("viewer-error", HTMLElement).textContent = text;
  }

  /** @param {number} offset @returns {number | null} */
  #neighbour(offset) {
    const position = this.id === null ? -1 : this.grid.positionOf(this.id);
    return position < 0 ? null : (this.grid.hits[position + offset]?.id ?? null);
  }

  /** @param {number | null} id @returns {Hit | undefined} */
  #hit(id) {
    return id === null ? undefined : this.grid.hits[this.grid.positionOf(id)];
  }

  /** @param {number} offset */
  #step(offset) {
    const id = this.#neighbour(offset);
    if (id !== null) replaceState({ photo: id });
  }

  /** @param {"like" | "unlike"} judgement */
  #judge(judgement) {
    if (this.id !== null) this.dispatchEvent(new CustomEvent(judgement, { detail: this.id }));
  }

  #toggleMarking() {
    if (this.#frame.isMarking) this.#frame.show(this.#hit(this.id)?.region ?? null);
    else this.#frame.mark();
  }

  #showMarking() {
    byId("viewer-like-part", HTMLButtonElement).hidden = this.#frame.region === null;
    byId("viewer-mark", HTMLButtonElement).setAttribute("aria-pressed", `${this.#frame.isMarking}`);
  }

  #likePart() {
    const { region } = this.#frame;
    if (this.id === null || region === null) return;
    this.dispatchEvent(new CustomEvent("like-part", { detail: { id: this.id, region } }));
  }

  /** Loads the photo's file when the thumbnail would be blurred, if the browser can show it. */
  #sharpen() {
    const { id } = this;
    byId("viewer-zoom-out", HTMLButtonElement).disabled = this.#zoom.scale === 1;
    const url = id === null ? "" : new URL(fileUrl(id), document.baseURI).href;
    const isSmall = !this.#image.classList.contains("is-reduced");
    if (this.#zoom.scale < FILE_FROM_SCALE || this.#image.src === url || isSmall) return;
    const file = new Image();
    file.src = url;
    const show = () => {
      if (this.id === id && this.#zoom.scale > 1) this.#image.src = url;
    };
    file.decode().then(show, () => undefined);
  }

  async #copyImage() {
    if (this.id === null) return;
    const image = new Image();
    image.src = thumbnailUrl(this.id, SIZES_PX[1]);
    // Safari writes only what it is given while it handles the click.
    const png = image.decode().then(() => pngOf(image));
    png.catch(() => undefined); // The page may not use the clipboard at all.
    try {
      await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
      const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => side.toLocaleString("en"));
      showToast(`Image copied: ${width} × ${height} pixels. Download saves the whole file.`);
    } catch {
      const isShown = image.complete && image.naturalWidth > 0;
      showToast(isShown ? "The browser does not allow copying images here. Download the photo instead." : "The photo cannot be displayed, so it was not copied.");
    }
  }

  /** Offers to open the folder if the server may do so for this browser. */
  async #offerFolder() {
    if (this.#canShow !== null) return;
    this.#canShow = false;
    try {
      this.#canShow = (await getFolders()).can_show;
    } catch {
      this.#canShow = null;
    }
    byId("viewer-folder", HTMLButtonElement).hidden = !this.#canShow;
  }

  async #openFolder() {
    if (this.id === null) return;
    try {
      showToast(`Opening ${(await showFolder(this.id)).folder}`);
    } catch (error) {
      if (error instanceof ApiError) showToast(problemText(error));
    }
  }

  async #copyPath() {
    const item = this.#photo ?? this.#hit(this.id);
    const path = item?.path ?? null;
    const isCopied = await copyText(path ?? byId("viewer-path", HTMLElement).textContent ?? "");
    if (!isCopied) showToast("The browser did not allow copying the path.");
    else showToast(path === null ? "Path copied. Bytes that are not UTF-8 are escaped." : "Path copied.");
  }

  /** @param {KeyboardEvent} event */
  #handleKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isZoomed = this.#zoom.scale > 1;
    if (event.key === "ArrowLeft") isZoomed ? this.#zoom.pan(PAN_PX, 0) : this.#step(-1);
    else if (event.key === "ArrowRight") isZoomed ? this.#zoom.pan(-PAN_PX, 0) : this.#step(1);
    else if (event.key === "ArrowUp" && isZoomed) this.#zoom.pan(0, PAN_PX);
    else if (event.key === "ArrowDown" && isZoomed) this.#zoom.pan(0, -PAN_PX);
    else if (event.key === "+" || event.key === "=") this.#zoom.step(1);
    else if (event.key === "-") this.#zoom.step(-1);
    else if (event.key === "0") this.#zoom.reset();
    else return;
    event.preventDefault();
  }
}

/**
 * @param {HTMLImageElement} image
 * @returns {Promise<Blob>}
 */
function pngOf(image) {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  canvas.getContext("2d")?.drawImage(image, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/** @param {number} bytes */
function sizeText(bytes) {
  if (bytes < 1 << 20) return `${Math.max(1, Math.round(bytes / 1024))} KiB`;
  return `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}
