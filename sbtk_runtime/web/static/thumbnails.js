// Thumbnails: the smallest size first, a sharper one when the page is idle.

import { thumbnailUrl } from "./api.js";

const SIZES_PX = [180, 360, 720];
const CONCURRENCY = 2;
const IDLE_MS = 350;
// Upscaling by less is not visible.
const MAX_UPSCALING = 1.2;
const MARGIN_ABOVE_PX = 200;
const MARGIN_BELOW_PX = 400;

/** @type {number | undefined} */
let timer;
let runs = 0;

/**
 * Loads the smallest thumbnail into an image that has none.
 * @param {HTMLImageElement} image
 * @param {number} id
 * @param {boolean} isHighPriority
 */
export function loadThumbnail(image, id, isHighPriority) {
  if (image.dataset.px !== undefined) return;
  image.fetchPriority = isHighPriority ? "high" : "auto";
  image.dataset.px = `${SIZES_PX[0]}`;
  image.dataset.photo = `${id}`;
  image.src = thumbnailUrl(id, SIZES_PX[0]);
}

/**
 * Cancels the download of an image that is no longer shown.
 * @param {HTMLImageElement} image
 */
export function cancelLoading(image) {
  if (image.complete && image.naturalWidth > 0) return;
  image.removeAttribute("src");
  delete image.dataset.px;
}

/**
 * Replaces visible thumbnails by ones of the screen's resolution, once no further call comes for a while.
 * @param {() => Iterable<{ image: HTMLImageElement, id: number }>} images
 */
export function scheduleSharpening(images) {
  runs += 1;
  clearTimeout(timer);
  timer = setTimeout(() => void sharpen([...images()], runs), IDLE_MS);
}

/**
 * @param {{ image: HTMLImageElement, id: number }[]} images
 * @param {number} run
 */
async function sharpen(images, run) {
  const queue = images.filter(({ image }) => isNearViewport(image) && !isBroken(image) && neededPx(image) > loadedPx(image));
  const worker = async () => {
    for (let next = queue.shift(); next !== undefined; next = queue.shift()) {
      if (run !== runs) return;
      await replace(next.image, next.id, neededPx(next.image));
    }
  };
  await Promise.all(Array.from({ length: CONCURRENCY }, worker));
}

/**
 * @param {HTMLImageElement} image
 * @param {number} id
 * @param {number} px
 */
async function replace(image, id, px) {
  const sharper = new Image();
  sharper.src = thumbnailUrl(id, px);
  try {
    await sharper.decode();
  } catch {
    return; // The small one stays.
  }
  // By now the image may be unloaded, or show another photo.
  if (image.dataset.px === undefined || image.dataset.photo !== `${id}`) return;
  image.dataset.px = `${px}`;
  image.src = sharper.src;
}

/** @param {HTMLImageElement} image */
function neededPx(image) {
  const side = Math.max(image.clientWidth, image.clientHeight);
  const shownPx = (side * Math.min(2, window.devicePixelRatio)) / MAX_UPSCALING;
  return SIZES_PX.find((px) => px >= shownPx) ?? SIZES_PX[SIZES_PX.length - 1];
}

/** @param {HTMLImageElement} image */
function loadedPx(image) {
  return Number(image.dataset.px ?? Infinity);
}

/** @param {HTMLImageElement} image */
function isBroken(image) {
  return image.complete && image.naturalWidth === 0;
}

/** @param {Element} element */
function isNearViewport(element) {
  const box = element.getBoundingClientRect();
  return box.bottom > -MARGIN_ABOVE_PX && box.top < window.innerHeight + MARGIN_BELOW_PX && box.width > 0;
}
