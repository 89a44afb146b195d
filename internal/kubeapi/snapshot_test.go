package kubeapi

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// TestSnapshot saves a running and a stopped server, restores each elsewhere, and
// asks for what was there: objects, tokens and administrators' certificates.
func TestSnapshot(t *testing.T) {
	t.Parallel()
	o := testOptions(t)
	c := startChild(t, o)
	client := clientOf(t, c.Config())
	createNamespace(t, client, "shop")
	token := requestToken(t, client, "shop", "istio-ca")
	if err := putConfigMap(t.Context(), client, "before"); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Dir(o.DataDir)
	running, stopped := filepath.Join(folder, "running.tar"), filepath.Join(folder, "stopped.tar")
	if err := SaveSnapshot(t.Context(), o, running); err != nil {
		t.Fatal(err)
	}
	if err := putConfigMap(t.Context(), client, "after"); err != nil {
		t.Fatal(err)
	}
	if mode := mustStat(t, running); mode != 0o600 {
		t.Errorf("snapshot has mode %o, want 600", mode)
	}
	old := c.Config() // its files are those of the old data directory
	c.Stop()
	if err := SaveSnapshot(t.Context(), o, stopped); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		file  string
		after bool
	}{"running": {running, false}, "stopped": {stopped, true}} {
		t.Run(name, func(t *testing.T) {
			restored := testOptions(t)
			if err := RestoreSnapshot(t.Context(), restored, tt.file); err != nil {
				t.Fatal(err)
			}
			c := startChild(t, restored)
			cfg := rest.CopyConfig(old)
			cfg.Host = c.Address()
			client := clientOf(t, cfg)
			if got := reviewToken(t, client, token, "istio-ca"); !got.Authenticated {
				t.Errorf("a token of before: %+v", got)
			}
			if _, err := client.CoreV1().ConfigMaps("default").Get(t.Context(), "before", metav1.GetOptions{}); err != nil {
				t.Error(err)
			}
			_, err := client.CoreV1().ConfigMaps("default").Get(t.Context(), "after", metav1.GetOptions{})
			if tt.after && err != nil || !tt.after && !apierrors.IsNotFound(err) {
				t.Errorf("written after the first snapshot: %v", err)
			}
			if err := putConfigMap(t.Context(), client, "new"); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("into a directory in use", func(t *testing.T) {
		err := RestoreSnapshot(t.Context(), o, running)
		if err == nil || !strings.Contains(err.Error(), "not empty") {
			t.Errorf("error %v, want one that says it is not empty", err)
		}
	})
	t.Run("damaged", func(t *testing.T) {
		b, err := os.ReadFile(running)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		damaged := filepath.Join(folder, "damaged.tar")
		if err := os.WriteFile(damaged, b, 0o600); err != nil {
			t.Fatal(err)
		}
		restored := testOptions(t)
		if err := RestoreSnapshot(t.Context(), restored, damaged); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("error %v, want one that says it is damaged", err)
		}
		if err := RestoreSnapshot(t.Context(), restored, running); err != nil {
			t.Errorf("the failed restore left something behind: %v", err)
		}
	})
}
