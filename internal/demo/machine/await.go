package machine

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Await calls f, with a pause between, until it returns nil, and says last what it
// said if the time is up: what happens on machines is waited for, not slept for.
func Await(ctx context.Context, limit, pause time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	last := errors.New("nothing was heard")
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", limit, last)
		case <-time.After(pause):
		}
	}
}
