// Images that are opened, pasted or dropped on the page: validated, classified and converted for upload.

import { idOf } from "./api.js";
import { byId, isTextInput, showToast } from "./dom.js";
import { displayName } from "./paths.js";
import { PHOTO_TYPE } from "./results_grid.js";

/**
 * @typedef {object} UploadedImage
 * @property {Blob} file what is sent to the server
 * @property {HTMLCanvasElement} pixels no side longer than MAX_SIDE_PX
 * @property {number} width
 * @property {number} height
 * @property {string} name
 * @property {"sketch" | "photo"} kind as detected
 */
/** @typedef {{ file: File, isFolder: boolean }} Given a file or folder as it was chosen, pasted or dropped */

const MEDIA_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"];
// The server accepts these; other formats are converted.
const SERVER_MEDIA_TYPES = MEDIA_TYPES.slice(0, 3);
const MAX_UPLOAD_BYTES = 2 << 20;
const MAX_UPLOAD_PIXELS = 16_000_000;
const MAX_FILE_BYTES = 64 << 20;
const MAX_PIXELS = 120_000_000;
const MAX_SIDE_PX = 1024;
// What a link or a text is dropped as, in Chromium and in Firefox.
const TEXT_TYPES = ["text/uri-list", "text/x-moz-url", "text/plain", "text/html"];
// Firefox sends dragover every 350 ms, others more often.
const DRAGOVER_TIMEOUT_MS = 600;

/** The reason why a file cannot be used, as a sentence. */
class ImageError extends Error {}

let uploads = 0;

/**
 * Accepts images from the file chooser, the clipboard and drag and drop.
 * @param {(image: UploadedImage, others: number) => void} onImage called with the number of further files
 * @param {(id: number) => void} onPhoto called when a photo of the gallery is dropped
 */
export function acceptImages(onImage, onPhoto) {
  const fileInput = byId("file-input", HTMLInputElement);
  fileInput.accept = MEDIA_TYPES.join(",");
  byId("upload", HTMLButtonElement).addEventListener("click", () => fileInput.click());
  fileInput.addEventListener("change", () => {
    void upload([...(fileInput.files ?? [])].map((file) => ({ file, isFolder: false })), onImage);
    fileInput.value = ""; // Otherwise choosing the same file again fires no event.
  });
  document.addEventListener("paste", (event) => {
    if (isTextInput(event.target) && !event.clipboardData?.types.includes("Files")) return;
    event.preventDefault();
    receive(event.clipboardData, onImage);
  });
  acceptDrops((event) => {
    const id = event.dataTransfer?.getData(PHOTO_TYPE);
    if (id) onPhoto(idOf(id));
    else receive(event.dataTransfer, onImage);
  });
}

/**
 * Says how many of several files are not used; "" if all are.
 * @param {number} others
 */
export function unusedText(others) {
  return others === 0 ? "" : ` Only one image can be searched with: ${others} more not used.`;
}

/**
 * @param {DataTransfer | null} carried
 * @param {(image: UploadedImage, others: number) => void} onImage
 */
function receive(carried, onImage) {
  // Folders are told from files while the event is handled, not later.
  const given = [...(carried?.items ?? [])].flatMap((item) => {
    const file = item.kind === "file" ? item.getAsFile() : null;
    return file === null ? [] : [{ file, isFolder: item.webkitGetAsEntry()?.isDirectory === true }];
  });
  if (given.length > 0) {
    void upload(given, onImage);
    return;
  }
  const types = carried?.types ?? [];
  const isLink = types.includes("text/uri-list") || types.includes("text/x-moz-url");
  const isText = types.some((type) => TEXT_TYPES.includes(type));
  const found = isLink ? "This is a link, not an image." : isText ? "This is text, not an image." : "This is not an image.";
  showToast(`${found} Save the image as a file and drop the file here, or copy the image itself and paste it.`);
}

/**
 * @param {readonly Given[]} given the first image is used
 * @param {(image: UploadedImage, others: number) => void} onImage not called if another upload started in the meantime
 */
async function upload(given, onImage) {
  const files = given.filter(({ isFolder }) => !isFolder).map(({ file }) => file);
  const file = files.find(({ type }) => MEDIA_TYPES.includes(type)) ?? files[0];
  if (file === undefined) {
    if (given.length > 0) showToast(folderText(given));
    return;
  }
  uploads += 1;
  const current = uploads;
  const others = given.length - 1;
  try {
    const image = await loadImage(file);
    if (current === uploads) onImage(image, others);
  } catch (error) {
    const reason = error instanceof ImageError ? error.message : "This image cannot be opened.";
    if (current === uploads) showToast(`${nameOf(file)}: ${reason}${unusedText(others)}`);
  }
}

/** @param {readonly Given[]} folders */
function folderText([{ file }, ...others]) {
  const what = others.length === 0 ? `${nameOf(file)} is a folder` : `${nameOf(file)} and ${others.length} more are folders`;
  return `${what}. To search with an image, drop the image itself. To find the photos in a folder, add it on the page Collection.`;
}

/** @param {File} file */
function nameOf(file) {
  return displayName({ path: file.name || "image" });
}

/**
 * @param {File} file
 * @returns {Promise<UploadedImage>}
 * @throws {ImageError} the file is not an image, or too large
 */
export async function loadImage(file) {
  if (file.size === 0) throw new ImageError("The file is empty.");
  // A name without a known suffix has no type, and browsers recognise images by their content.
  if (file.type !== "" && !MEDIA_TYPES.includes(file.type)) {
    throw new ImageError("Unsupported image format. Use PNG, JPEG, WebP, GIF, BMP or AVIF.");
  }
  if (file.size > MAX_FILE_BYTES) {
    throw new ImageError(`The file is too large. The limit is ${MAX_FILE_BYTES >> 20} MiB.`);
  }
  const { pixels, pixelCount } = await decode(file);
  const { width, height } = pixels;
  const kind = detectKind(pixels);
  const isSmall = file.size <= MAX_UPLOAD_BYTES && pixelCount <= MAX_UPLOAD_PIXELS;
  const isAccepted = SERVER_MEDIA_TYPES.includes(file.type) && isSmall;
  const sent = isAccepted ? file : await encode(pixels, kind);
  return { file: sent, pixels, width, height, name: nameOf(file), kind };
}

/**
 * @param {File} file
 * @returns {Promise<{ pixels: HTMLCanvasElement, pixelCount: number }>} scaled down to MAX_SIDE_PX, and the file's pixels
 */
async function decode(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(new ImageError("The file is damaged or not an image."));
    });
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    if (width * height === 0) throw new ImageError("The image has no pixels.");
    if (width * height > MAX_PIXELS) {
      const limit = `${MAX_PIXELS / 1_000_000} megapixels`;
      throw new ImageError(`The image has ${width} × ${height} pixels. The limit is ${limit}.`);
    }
    return { pixels: drawScaled(image, Math.min(1, MAX_SIDE_PX / Math.max(width, height))), pixelCount: width * height };
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/**
 * @param {HTMLImageElement} image
 * @param {number} scale
 * @returns {HTMLCanvasElement}
 */
function drawScaled(image, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new ImageError("This browser cannot open images.");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/**
 * Detects whether an image is a sketch: mostly background, with few coloured pixels.
 * @param {HTMLCanvasElement} pixels
 * @returns {"sketch" | "photo"}
 */
function detectKind(pixels) {
  const side = 96;
  const small = document.createElement("canvas");
  small.width = small.height = side;
  const context = small.getContext("2d", { willReadFrequently: true });
  if (context === null) return "photo";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.drawImage(pixels, 0, 0, side, side);
  const { data } = context.getImageData(0, 0, side, side);
  const levels = [];
  let coloured = 0;
  for (let index = 0; index < data.length; index += 4) {
    const [red, green, blue] = [data[index], data[index + 1], data[index + 2]];
    levels.push((red + green + blue) / 3);
    if (Math.max(red, green, blue) - Math.min(red, green, blue) > 40) coloured += 1;
  }
  const background = levels.toSorted((a, b) => a - b)[levels.length >> 1];
  const share = levels.filter((level) => Math.abs(level - background) < 24).length / levels.length;
  return share > 0.6 && coloured / levels.length < 0.06 ? "sketch" : "photo";
}

/**
 * @param {HTMLCanvasElement} pixels
 * @param {"sketch" | "photo"} kind
 * @returns {Promise<Blob>}
 */
function encode(pixels, kind) {
  const type = kind === "sketch" ? "image/png" : "image/webp";
  return new Promise((resolve, reject) => {
    pixels.toBlob((blob) => (blob ? resolve(blob) : reject(new ImageError("Cannot convert this image."))), type, 0.92);
  });
}

/**
 * Returns a part of an image.
 * @param {UploadedImage} image
 * @param {readonly [number, number, number, number]} region x, y, width and height as shares of the image
 * @returns {Promise<UploadedImage>}
 */
export async function cropped(image, [x, y, width, height]) {
  const { pixels: source } = image;
  const pixels = document.createElement("canvas");
  pixels.width = Math.max(1, Math.round(width * source.width));
  pixels.height = Math.max(1, Math.round(height * source.height));
  const context = pixels.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new ImageError("This browser cannot open images.");
  context.drawImage(source, -Math.round(x * source.width), -Math.round(y * source.height));
  const file = await encode(pixels, image.kind);
  return { ...image, file, pixels, width: pixels.width, height: pixels.height };
}

/** @param {(event: DragEvent) => void} onDrop */
function acceptDrops(onDrop) {
  const root = document.documentElement;
  /** @type {number | undefined} */
  let timer;
  const highlight = (/** @type {boolean} */ isOver) => {
    clearTimeout(timer);
    root.classList.toggle("is-dropping", isOver);
  };
  document.addEventListener("dragover", (event) => {
    if (!isHandled(event)) return;
    event.preventDefault();
    if (event.dataTransfer) event.dataTransfer.dropEffect = "copy";
    highlight(canDrop(event));
    // A timeout, because no dragleave comes if the element under the pointer is removed.
    timer = setTimeout(() => highlight(false), DRAGOVER_TIMEOUT_MS);
  });
  document.addEventListener("drop", (event) => {
    highlight(false);
    if (!isHandled(event)) return;
    event.preventDefault();
    onDrop(event);
  });
}

/**
 * Returns whether the page handles a drop. Otherwise browsers would leave the page for a link that is dropped on it.
 * @param {DragEvent} event
 */
function isHandled(event) {
  const isText = event.dataTransfer?.types.some((type) => TEXT_TYPES.includes(type)) ?? false;
  return canDrop(event) || (isText && !isTextInput(event.target));
}

/** @param {DragEvent} event */
function canDrop(event) {
  const types = event.dataTransfer?.types ?? [];
  return types.includes("Files") || types.includes(PHOTO_TYPE);
}
