package envoy

import (
	"encoding/json"
	"os"
	"testing"
)

// Root stops only what the user could stop who wrote the record.
func TestRunningIsOfTheRecordsOwner(t *testing.T) {
	dir := t.TempDir()
	birth, err := processBirth(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(record{PID: os.Getpid(), Birth: birth})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(recordPath(dir), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := Running(dir); got != os.Getpid() {
		t.Errorf("our own process: %d, want %d", got, os.Getpid())
	}
	if err := os.Chown(recordPath(dir), 1234, 1234); err != nil {
		t.Skip("needs root, to give the record to another user")
	}
	if got := Running(dir); got != 0 {
		t.Errorf("the process of another user: %d, want none", got)
	}
}
