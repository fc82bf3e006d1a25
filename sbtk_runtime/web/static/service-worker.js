// Keeps the files of the page, so that it opens while the server is stopped. Every request still goes to the
// server first; photos and search results are never kept.

const CACHE = "sbtk-page";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

// The page lists the files that it loaded before the service worker was active.
self.addEventListener("message", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(event.data.filter(isPageFile))));
});

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET" && isPageFile(event.request.url)) event.respondWith(load(event.request));
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

/** @param {Request} request */
async function load(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const saved = await cache.match(request);
    if (saved === undefined) throw error;
    return saved;
  }
}
