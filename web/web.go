// Package web is the page of a server: what is served, how full it gets and how fast, with the actions of the control API,
// for a browser.
//
//	token := web.NewToken()
//	h := web.Handler(web.Options{Token: token, API: server.Handler(), Watcher: watcher, Metrics: metrics.Handler(watcher.Latest)})
//	fmt.Println("http://127.0.0.1:8080/?token=" + token)
//	http.ListenAndServe("127.0.0.1:8080", h)
//
// # Guarantees
//
//   - Nothing is answered without the token but /metrics, and that only to loopback clients: neither the page nor the
//     API. The token is in the URL once; a cookie takes its place, which other sites' pages can't use.
//   - A request whose Host is neither an address, nor localhost, nor one of Options.Hosts is refused, so that a foreign
//     name that resolves to this server is no way in; a request from a page of another origin is refused.
//   - The page loads nothing from elsewhere, and its security policy forbids it to.
//
// The page is plain HTML, CSS and JavaScript, embedded in the program.
package web

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"embed"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"github.com/dmsnap/dmsnap/monitor"
	"github.com/dmsnap/dmsnap/server/api"
)

//go:embed static
var static embed.FS

// Options are what a page shows, and to whom.
type Options struct {
	Token   string       // required; see NewToken
	API     http.Handler // the control API, for requests below /v1/
	Watcher *monitor.Watcher
	Metrics http.Handler // for /metrics; nil: there is none
	Hosts   []string     // names, without a port, under which browsers may reach the server besides localhost
}

// NewToken returns a token of 128 random bits.
func NewToken() string { return rand.Text() }

// cookieName is that of the cookie that takes the token's place.
const cookieName = "dmsnap"

// policy is the page's content security policy.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// Handler returns the handler of a page. It panics without a token.
func Handler(o Options) http.Handler {
	if o.Token == "" {
		panic("web.Handler: no token")
	}
	files, err := fs.Sub(static, "static")
	if err != nil {
		panic(err)
	}
	h := &handler{Options: o, files: http.FileServerFS(files)}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", h.files)
	mux.HandleFunc("GET /live", h.live)
	mux.Handle("GET /static/{name}", http.StripPrefix("/static", h.files))
	mux.Handle("/v1/", o.API)
	h.inside = mux
	return h
}

type handler struct {
	Options
	files  http.Handler
	inside http.Handler // for those with the token
}

// ServeHTTP judges a request, and answers it.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	head := w.Header()
	head.Set("Content-Security-Policy", policy)
	head.Set("X-Content-Type-Options", "nosniff")
	head.Set("Referrer-Policy", "no-referrer")
	head.Set("Cross-Origin-Resource-Policy", "same-origin")
	head.Set("Cache-Control", "no-store")
	switch {
	case !h.knownHost(r.Host):
		refuse(w, http.StatusForbidden, "this server is not known as "+r.Host)
	case !sameOrigin(r):
		refuse(w, http.StatusForbidden, "requests from pages of other origins are refused")
	case r.URL.Path == "/metrics" && h.Metrics != nil && (r.Method == http.MethodGet || r.Method == http.MethodHead) && (fromLoopback(r) || h.allowed(r)):
		h.Metrics.ServeHTTP(w, r)
	case r.URL.Path == "/" && r.URL.Query().Has("token"):
		h.exchange(w, r)
	case !h.allowed(r):
		refuse(w, http.StatusUnauthorized, "the token is missing or wrong: open the URL that the server printed when it started, or send it as \"Authorization: Bearer\"")
	default:
		h.inside.ServeHTTP(w, r)
	}
}

// refuse answers with an error: JSON, as the API's.
func refuse(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(api.ErrorReply{Error: api.Error{Code: api.CodeForbidden, Message: message}})
}

// knownHost reports whether a Host header names this server: by an address, as localhost, or as Options.Hosts say.
func (h *handler) knownHost(hostport string) bool {
	host := hostport
	if name, _, err := net.SplitHostPort(hostport); err == nil {
		host = name
	}
	host = strings.Trim(host, "[]")
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	for _, name := range append([]string{"localhost"}, h.Hosts...) {
		if strings.EqualFold(host, name) {
			return true
		}
	}
	return false
}

// sameOrigin reports whether a request comes from a page of this server, or from no page.
func sameOrigin(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		// Another page may lead here by a link, as a chat or a ticket does with the printed URL.
		return r.Method == http.MethodGet && r.URL.Path == "/" && r.Header.Get("Sec-Fetch-Mode") == "navigate"
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && strings.EqualFold(u.Host, r.Host)
}

func fromLoopback(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && from.Addr().Unmap().IsLoopback()
}

// cookie is the value of the cookie: not the token itself, which would also be accepted in a URL.
func (h *handler) cookie() string {
	sum := sha256.Sum256([]byte("dmsnap cookie " + h.Token))
	return hex.EncodeToString(sum[:])
}

// equal compares secrets in constant time.
func equal(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

// allowed reports whether a request has the token.
func (h *handler) allowed(r *http.Request) bool {
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return equal(token, h.Token)
	}
	for _, c := range r.CookiesNamed(h.cookieNameFor(r)) {
		if equal(c.Value, h.cookie()) {
			return true
		}
	}
	return false
}

// cookieNameFor is the name of the cookie: cookies do not distinguish ports, and a host may have several servers.
func (h *handler) cookieNameFor(r *http.Request) string {
	if _, port, err := net.SplitHostPort(r.Host); err == nil {
		return cookieName + "-" + port
	}
	return cookieName
}

// exchange gives a browser that has the token in its URL a cookie instead, and leads it to the page.
func (h *handler) exchange(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet || !equal(r.URL.Query().Get("token"), h.Token) {
		refuse(w, http.StatusUnauthorized, "the token is wrong: it is a new one each time the server is started")
		return
	}
	http.SetCookie(w, &http.Cookie{Name: h.cookieNameFor(r), Value: h.cookie(), Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: r.TLS != nil})
	// A redirect by status would be part of a navigation from another site, in which a strict cookie is not sent.
	w.Header().Set("Refresh", "0; url=/")
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Write([]byte("<!doctype html><title>dmsnap</title><p><a href=\"/\">Continue</a></p>\n"))
}
