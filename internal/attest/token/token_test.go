package token

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	for _, names := range [][2]string{{"shop", "db-1-x7"}, {"a", "db.example.com"}, {strings.Repeat("n", 63), strings.Repeat("m", 253)}} {
		want, err := New(names[0], names[1])
		if err != nil {
			t.Fatal(err)
		}
		got, err := Read(strings.NewReader(" " + want.Reveal() + "\n"))
		if err != nil || got != want {
			t.Errorf("Read(%q) = %v, %v", want.Reveal(), got, err)
		}
		if !got.Matches(want.Hash()) || got.Matches("") || len(want.Hash()) != 64 {
			t.Errorf("hash %q", want.Hash())
		}
	}
	a, _ := New("shop", "db")
	b, _ := New("shop", "db")
	if a.Matches(b.Hash()) {
		t.Error("two tokens match each other")
	}
}

func TestSecretIsNotPrinted(t *testing.T) {
	tok, err := New("shop", "db")
	if err != nil {
		t.Fatal(err)
	}
	secret := tok.Reveal()[strings.LastIndex(tok.Reveal(), ".")+1:]
	raw := fmt.Sprint(tok.secret)
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		for _, arg := range []any{tok, &tok} {
			if s := fmt.Sprintf(format, arg); strings.Contains(s, secret) || strings.Contains(s, raw) {
				t.Errorf("%s prints %s", format, s)
			}
		}
	}
	if s := tok.LogValue().String(); strings.Contains(s, secret) {
		t.Errorf("log value %s", s)
	}
}

func TestMalformed(t *testing.T) {
	tok, err := New("shop", "db")
	if err != nil {
		t.Fatal(err)
	}
	good := tok.Reveal()
	for name, s := range map[string]string{
		"empty": "", "prefix": "ijt_", "other prefix": "x" + good, "cut off": good[:len(good)-1], "longer": good + "a",
		"upper case": strings.ToUpper(good), "inner space": good[:8] + " " + good[8:], "no name": "ijt_shop." + good[len(good)-52:],
		"namespace with a slash": strings.Replace(good, "shop", "sh/p", 1), "unused bits": good[:len(good)-1] + "b",
		"too long": "ijt_" + strings.Repeat("a", 5000),
	} {
		if got, err := Parse(s); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: Parse(%q) = %v, %v", name, s, got, err)
		}
	}
	if _, err := New("Shop", "db"); err == nil {
		t.Error("New takes a namespace that cannot exist")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("ijt_shop.db." + strings.Repeat("a", 52))
	f.Add("ijt_shop.db.x." + strings.Repeat("q", 52))
	f.Add("ijt_..")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := Parse(s)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("Parse(%q): %v", s, err)
			}
			return
		}
		if tok.Reveal() != s {
			t.Fatalf("two spellings of one token: %q and %q", s, tok.Reveal())
		}
		if strings.Contains(tok.Namespace, ".") || !isSubdomain(tok.Name) {
			t.Fatalf("names %q %q", tok.Namespace, tok.Name)
		}
	})
}
