package text

import (
	"regexp"
	"strings"
)

var urls = regexp.MustCompile(`[A-Za-z0-9+.-]+://[^\s"']*`)

// WithoutSecrets returns a text without what is secret in its URLs: users with their passwords, and queries, which may be signatures. The query
// of an NBD URI is no secret: it names a socket.
func WithoutSecrets(s string) string {
	if !strings.Contains(s, "://") {
		return s
	}
	return urls.ReplaceAllStringFunc(s, func(url string) string {
		scheme, rest, _ := strings.Cut(url, "://")
		if strings.HasPrefix(scheme, "nbd") {
			return url
		}
		before, query, is := strings.Cut(rest, "?")
		if is {
			if end := len(strings.TrimRight(query, ",.:;)")); end < len(query) { // the sentence goes on
				before += query[end:]
			}
		}
		host, _, _ := strings.Cut(before, "/")
		return scheme + "://" + before[strings.LastIndex(host, "@")+1:]
	})
}
