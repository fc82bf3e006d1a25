// Keeps the files of the page, so that it opens while the server is stopped. Every request still goes to the
// server first; photos and search results are never kept.

const CACHE = "sbtk-page";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// The page lists the files that it loaded before the service worker was active.
self.addEventListener("message", (event) => {
  event.waitUntil(keep((cache) => cache.addAll(event.data.filter(isPageFile))));
});

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && isPageFile(event.request.url)) event.respondWith(load(event));
});

/** @param {string} url */
function isPageFile(url) {
  const { pathname, search, origin } = new URL(url);
  // Every gallery of a server has its own page, at g/NAME/, and its own service worker.
  const { pathname: root } = new URL(self.registration.scope);
  const isInside = origin === self.location.origin && pathname.startsWith(root);
  // A search part may hold the token.
  return isInside && search === "" && /^(collection|static\/.*)?$/.test(pathname.slice(root.length));
}

/** @param {FetchEvent} event */
async function load(event) {
  const { request } = event;
  let response;
  try {
    response = await fetch(request);
  } catch {
    const saved = await caches.match(request, { cacheName: CACHE }).catch(() => undefined);
    // As without a service worker.
    return saved ?? Response.error();
  }
  if (response.ok) {
    const copy = response.clone();
    event.waitUntil(keep((cache) => cache.put(request, copy)));
  }
  return response;
}

/**
 * Keeps files if the browser lets it: there may be no room, and no cache in private windows.
 * @param {(cache: Cache) => Promise<void>} write
 */
async function keep(write) {
  try {
    await write(await caches.open(CACHE));
  } catch (error) {
    console.info("sbtk: the page does not open while the server is stopped:", error);
  }
}
