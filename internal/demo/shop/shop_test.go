package shop

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// open starts the whole shop with one version of reviews, and gives its page's URL.
func open(t *testing.T, version, failing string) string {
	t.Helper()
	urls := map[string]string{}
	for _, name := range []string{Ratings, Details, Reviews, ProductPage} {
		o := Options{Service: name, Version: "v1", Instance: name + "-host", URL: func(s string) string { return urls[s] }}
		if name == Reviews {
			o.Version = version
		}
		if name == failing {
			o.FailFile = filepath.Join(t.TempDir(), "fail")
			if err := os.WriteFile(o.FailFile, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		h, err := Handler(o)
		if err != nil {
			t.Fatal(err)
		}
		s := httptest.NewServer(h)
		t.Cleanup(s.Close)
		urls[name] = s.URL
	}
	return urls[ProductPage]
}

func TestPage(t *testing.T) {
	for _, tc := range []struct {
		version, failing string
		status           int
		want, not        string
	}{
		{"v1", "", 200, "reviews v1 by reviews-host", "★"},
		{"v2", "", 200, "color:black", "not available"},
		{"v3", "", 200, "color:red", "not available"},
		{"v3", Ratings, 502, "Ratings are not available", "★"},
		{"v1", Details, 502, "Details are not available", "Comedy"},
		{"v1", Reviews, 502, "Reviews are not available", "Dromio"},
	} {
		t.Run(tc.version+tc.failing, func(t *testing.T) {
			resp, err := http.Get(open(t, tc.version, tc.failing))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tc.status || !strings.Contains(string(body), tc.want) || strings.Contains(string(body), tc.not) {
				t.Errorf("%s\n%s", resp.Status, body)
			}
			if got := resp.Header.Get(InstanceHeader); got != "productpage-host" {
				t.Errorf("instance %q", got)
			}
		})
	}
}

func TestUnknownService(t *testing.T) {
	if _, err := Handler(Options{Service: "carts"}); err == nil {
		t.Error("no error")
	}
}
