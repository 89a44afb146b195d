package report

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"testing"
)

func TestWrite(t *testing.T) {
	tests := map[string]struct {
		write func(*bytes.Buffer) error
		want  string
	}{
		"ready": {
			func(b *bytes.Buffer) error {
				return WriteReady(b, Ready{Address: "https://127.0.0.1:1", Port: 1, Kubeconfig: "/k", Version: "v1", PID: 2})
			},
			`{"ready":{"address":"https://127.0.0.1:1","port":1,"kubeconfig":"/k","version":"v1","pid":2}}`,
		},
		"coded, wrapped": {
			func(b *bytes.Buffer) error {
				return WriteFatal(b, fmt.Errorf("start: %w", Errorf(CodePort, "port %d", 1)))
			},
			`{"fatal":{"code":"port-in-use","error":"start: port 1"}}`,
		},
		"not coded": {
			func(b *bytes.Buffer) error { return WriteFatal(b, errors.New("two\nlines")) },
			`{"fatal":{"code":"internal","error":"two\nlines"}}`,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if err := tt.write(&b); err != nil {
				t.Fatal(err)
			}
			if b.String() != tt.want+"\n" {
				t.Errorf("wrote %swant  %s", b.String(), tt.want)
			}
		})
	}
}

func TestErrorfKeepsTheCause(t *testing.T) {
	if err := Errorf(CodeDataDir, "open: %w", fs.ErrPermission); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v does not wrap its cause", err)
	}
}
