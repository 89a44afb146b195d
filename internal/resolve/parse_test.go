package resolve

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
)

func TestWildcardMatch(t *testing.T) {
	for in, want := range map[string]ir.StringMatch{
		"*":      {Present: true},
		"a":      {Exact: "a"},
		"/a/*":   {Prefix: "/a/"},
		"*.html": {Suffix: ".html"},
		"a*b":    {Exact: "a*b"},
	} {
		if got := wildcardMatch(in); got != want {
			t.Errorf("%q: got %+v, want %+v", in, got, want)
		}
	}
}

func TestTemplateRegex(t *testing.T) {
	for _, c := range []struct {
		template, path string
		want           bool
	}{
		{"/a/{*}", "/a/b", true}, {"/a/{*}", "/a/b/c", false}, {"/a/{*}", "/a/", false},
		{"/a/{**}", "/a/b/c", true}, {"/{*}/x", "/a/x", true}, {"/{*}/x", "/a/b/x", false},
		{"/a.b/{*}", "/acb/x", false}, {"/{*/a}/{*}", "/{*/a}/b", true},
	} {
		if got := regexp.MustCompile("^(?:" + templateRegex(c.template) + ")$").MatchString(c.path); got != c.want {
			t.Errorf("%s matches %s: %v, want %v", c.template, c.path, got, c.want)
		}
	}
}

func TestHostMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, host string
		want          bool
	}{
		{"a.b", "a.b", true}, {"a.b", "x.a.b", false}, {"*", "a.b", true}, {"*.b", "a.b", true}, {"*.b", "*.a.b", true},
		{"*.a.b", "*.b", false}, {"*.b", "b", false}, {"a.b", "*.b", false},
	} {
		if got := hostMatches(c.pattern, c.host); got != c.want {
			t.Errorf("%s matches %s: %v, want %v", c.pattern, c.host, got, c.want)
		}
	}
}

func TestParseRetryOn(t *testing.T) {
	for _, c := range []struct {
		in, on   string
		statuses []uint32
	}{
		{"5xx", "5xx", nil},
		{"503, reset", "reset,retriable-status-codes", []uint32{503}},
		{"503,retriable-status-codes,429", "retriable-status-codes", []uint32{503, 429}},
		{"700,,", "700", nil},
	} {
		on, statuses := parseRetryOn(c.in)
		if on != c.on || !slices.Equal(statuses, c.statuses) {
			t.Errorf("%q: got %q %v, want %q %v", c.in, on, statuses, c.on, c.statuses)
		}
	}
}

func TestTargetPort(t *testing.T) {
	ports := map[string]uint32{"http": 9999, "named": 8443}
	for _, c := range []struct {
		name string
		port model.Port
		win  bool
		want uint32
		ok   bool
	}{
		{"the number itself", model.Port{Name: "x", Number: 80}, false, 80, true},
		{"a target number", model.Port{Name: "http", Number: 80, TargetPort: 8080}, false, 8080, true},
		{"a service port's name wins", model.Port{Name: "http", Number: 80, TargetPort: 8080}, true, 9999, true},
		{"a name", model.Port{Name: "x", Number: 80, TargetName: "named"}, false, 8443, true},
		{"a name that is not there", model.Port{Name: "x", Number: 80, TargetName: "other"}, false, 0, false},
	} {
		if got, ok := targetPort(c.port, ports, c.win); got != c.want || ok != c.ok {
			t.Errorf("%s: got %d %v, want %d %v", c.name, got, ok, c.want, c.ok)
		}
	}
}

func FuzzWildcardMatch(f *testing.F) {
	for _, s := range []string{"", "*", "**", "a*", "*a", "a", "/files/{*}/{**}", "{*"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m := wildcardMatch(s)
		set := 0
		for _, v := range []string{m.Exact, m.Prefix, m.Suffix, m.Contains, m.Regex} {
			if v != "" {
				set++
			}
		}
		if m.Present && set > 0 || !m.Present && s != "" && set != 1 {
			t.Errorf("%q is matched by %+v", s, m)
		}
		if strings.ToValidUTF8(s, "") != s {
			return
		}
		if _, err := regexp.Compile(templateRegex(s)); err != nil {
			t.Errorf("template %q: %v", s, err)
		}
	})
}

func FuzzPortSet(f *testing.F) {
	f.Add("!http=8080,x=1;y/80/1/8080/http")
	f.Add(";")
	f.Add("a=;b")
	f.Fuzz(func(t *testing.T, s string) {
		parsed, err := parsePortSet(s)
		if err != nil {
			return
		}
		again, err := parsePortSet(parsed.String())
		if err != nil || again.byService != parsed.byService || !maps.Equal(again.named, parsed.named) || !slices.Equal(again.own, parsed.own) {
			t.Errorf("%q: %+v, read again %+v, %v", s, parsed, again, err)
		}
	})
}

func FuzzParseRetryOn(f *testing.F) {
	f.Add("503,reset")
	f.Add(" , 100,")
	f.Fuzz(func(t *testing.T, s string) {
		on, statuses := parseRetryOn(s)
		again, more := parseRetryOn(on)
		if again != on || len(more) > 0 {
			t.Errorf("%q gives %q, which gives %q %v", s, on, again, more)
		}
		if len(statuses) > 0 && !strings.Contains(on, onStatuses) {
			t.Errorf("%q: statuses %v without a condition", s, statuses)
		}
	})
}

func FuzzParsePrefix(f *testing.F) {
	f.Add("10.0.0.1/8")
	f.Add("fe80::1%eth0")
	f.Add("::1")
	f.Fuzz(func(t *testing.T, s string) {
		if p, ok := parsePrefix(s); ok && (!p.IsValid() || p != p.Masked()) {
			t.Errorf("%q gives %v", s, p)
		}
	})
}
