// Image files that people bring along: opened, judged and made fit to be sent.

/**
 * @typedef {object} Picture
 * @property {Blob} file what the server gets
 * @property {HTMLCanvasElement} pixels no side longer than MAX_SIDE_PX
 * @property {number} width
 * @property {number} height
 * @property {string} name
 * @property {"sketch" | "photo"} looksLike
 */

/** What the file chooser offers. Other formats than the first three are converted here. */
export const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"];

const SENT_AS_THEY_ARE = TYPES.slice(0, 3);
const MAX_SENT_BYTES = 2 << 20;
const MAX_FILE_BYTES = 64 << 20;
const MAX_PIXELS = 120_000_000;
const MAX_SIDE_PX = 1024;

/** What keeps a file from being a picture, as a sentence. */
export class BadPicture extends Error {}

/**
 * Returns the picture in a file.
 * @param {File} file
 * @returns {Promise<Picture>}
 * @throws {BadPicture} it is none, or too large
 */
export async function pictureFrom(file) {
  if (!TYPES.includes(file.type)) {
    throw new BadPicture("That is no picture sbtk takes: use PNG, JPEG, WebP, GIF, BMP or AVIF.");
  }
  if (file.size > MAX_FILE_BYTES) {
    throw new BadPicture(`That file is too large: at most ${MAX_FILE_BYTES >> 20} MiB.`);
  }
  const pixels = await pixelsOf(file);
  const { width, height } = pixels;
  const looksLike = guess(pixels);
  const isFit = SENT_AS_THEY_ARE.includes(file.type) && file.size <= MAX_SENT_BYTES;
  const sent = isFit ? file : await smallerFile(pixels, looksLike);
  return { file: sent, pixels, width, height, name: file.name || "picture", looksLike };
}

/**
 * @param {File} file
 * @returns {Promise<HTMLCanvasElement>}
 */
async function pixelsOf(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(new BadPicture("That picture is damaged, or no picture at all."));
    });
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    if (width * height === 0) throw new BadPicture("That picture has no size.");
    if (width * height > MAX_PIXELS) {
      throw new BadPicture(`That picture has ${width} × ${height} pixels, too many to open.`);
    }
    return drawn(image, Math.min(1, MAX_SIDE_PX / Math.max(width, height)));
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/**
 * @param {HTMLImageElement} image
 * @param {number} scale
 * @returns {HTMLCanvasElement}
 */
function drawn(image, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (context === null) throw new BadPicture("This browser cannot open pictures.");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/**
 * Guesses what a picture is: a sketch is mostly paper, and hardly coloured.
 * @param {HTMLCanvasElement} pixels
 * @returns {"sketch" | "photo"}
 */
function guess(pixels) {
  const side = 96;
  const small = document.createElement("canvas");
  small.width = small.height = side;
  const context = small.getContext("2d", { willReadFrequently: true });
  if (context === null) return "photo";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.drawImage(pixels, 0, 0, side, side);
  const { data } = context.getImageData(0, 0, side, side);
  const greys = [];
  let coloured = 0;
  for (let index = 0; index < data.length; index += 4) {
    const [red, green, blue] = [data[index], data[index + 1], data[index + 2]];
    greys.push((red + green + blue) / 3);
    if (Math.max(red, green, blue) - Math.min(red, green, blue) > 40) coloured += 1;
  }
  const paper = greys.toSorted((a, b) => a - b)[greys.length >> 1];
  const onPaper = greys.filter((grey) => Math.abs(grey - paper) < 24).length / greys.length;
  return onPaper > 0.6 && coloured / greys.length < 0.06 ? "sketch" : "photo";
}

/**
 * @param {HTMLCanvasElement} pixels
 * @param {"sketch" | "photo"} looksLike
 * @returns {Promise<Blob>}
 */
function smallerFile(pixels, looksLike) {
  const type = looksLike === "sketch" ? "image/png" : "image/webp";
  return new Promise((resolve, reject) => {
    pixels.toBlob(
      (blob) => (blob ? resolve(blob) : reject(new BadPicture("That picture cannot be converted."))),
      type,
      0.92,
    );
  });
}
