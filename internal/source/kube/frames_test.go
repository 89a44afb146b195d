package kube

import (
	"bufio"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestFrames(t *testing.T) {
	const one = `ADDED {"a":"}"}`
	long := `{"a":"` + strings.Repeat("x", 1000) + `"}`
	for name, c := range map[string]struct{ body, want string }{
		"lines":     {`{"type":"ADDED","object":{"a":"}"}}` + "\n" + `{"type":"DELETED","object":` + long + "}\r\n", one + " DELETED " + long},
		"documents": {`{"type":"ADDED","object":{"a":"}"}}` + "\n" + `{"object":{},"type":"MODIFIED"}{"type":"ADDED","object":{}}` + "\n", one + " MODIFIED {} ADDED {}"},
		"pretty":    {"{\n \"type\": \"ADDED\",\n \"object\": {\"a\":\"}\"}\n}\n" + `{"type":"MODIFIED","object":{}}` + "\n", one + " MODIFIED {}"},
		"cut":       {`{"type":"ADDED","object":{"a":"}"}}` + "\n" + `{"type":"DELE`, one},
	} {
		t.Run(name, func(t *testing.T) {
			f := &frames{in: bufio.NewReaderSize(iotest.HalfReader(strings.NewReader(c.body)), 16)}
			var got []string
			for {
				typ, raw, err := f.next()
				if err != nil {
					if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
						t.Error(err)
					}
					break
				}
				got = append(got, string(typ), string(raw))
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("got  %q\nwant %q", strings.Join(got, " "), c.want)
			}
		})
	}
}
