// Thumbnails: the smallest at once, a sharper one in its place when nothing is more urgent.

import { thumbnailUrl } from "./api.js";

const SMALLEST_PX = 180;
const SIZES_PX = [180, 360, 720];
const AT_ONCE = 2;
const CALM_MS = 350;
// Up to here nobody sees that a picture is shown larger than it is.
const STRETCH = 1.2;

/** @type {number | undefined} */
let calming;
let round = 0;

/**
 * Gives an image its first thumbnail, unless it has one.
 * @param {HTMLImageElement} image
 * @param {number} id
 * @param {boolean} isUrgent
 */
export function showSmall(image, id, isUrgent) {
  if (image.dataset.px !== undefined) return;
  image.fetchPriority = isUrgent ? "high" : "auto";
  image.dataset.px = `${SMALLEST_PX}`;
  image.src = thumbnailUrl(id, SMALLEST_PX);
}

/** Lets go of thumbnails that are still under way: they are not wanted any more. @param {HTMLImageElement} image */
export function drop(image) {
  if (image.complete && image.naturalWidth > 0) return;
  image.removeAttribute("src");
  delete image.dataset.px;
}

/**
 * Soon gives those images that are in sight as many pixels as the screen can show.
 * @param {() => Iterable<{ image: HTMLImageElement, id: number }>} shown
 */
export function sharpenSoon(shown) {
  round += 1;
  clearTimeout(calming);
  calming = setTimeout(() => void sharpen([...shown()], round), CALM_MS);
}

/**
 * @param {{ image: HTMLImageElement, id: number }[]} shown
 * @param {number} mine
 */
async function sharpen(shown, mine) {
  const waiting = shown.filter(
    ({ image }) => isInSight(image) && !isBroken(image) && wantedPx(image) > pxOf(image),
  );
  const lane = async () => {
    for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
      if (mine !== round) return;
      await replace(next.image, next.id, wantedPx(next.image));
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, lane));
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
  if (image.dataset.px === undefined) return;
  image.dataset.px = `${px}`;
  image.src = sharper.src;
}

/** @param {HTMLImageElement} image */
function wantedPx(image) {
  const shownPx = (image.clientWidth * Math.min(2, window.devicePixelRatio)) / STRETCH;
  return SIZES_PX.find((px) => px >= shownPx) ?? SIZES_PX[SIZES_PX.length - 1];
}

/** @param {HTMLImageElement} image */
function pxOf(image) {
  return Number(image.dataset.px ?? Infinity);
}

/** @param {HTMLImageElement} image */
function isBroken(image) {
  return image.complete && image.naturalWidth === 0;
}

/** @param {Element} element */
function isInSight(element) {
  const box = element.getBoundingClientRect();
  return box.bottom > -200 && box.top < window.innerHeight + 400 && box.width > 0;
}
